#pragma once

#include <cstdint>
#include <vector>

#include "chameleon/export.h"

namespace chameleon {

/// The score of a text: token_logprobs[i] is the natural logarithm of the probability of token_ids[i + 1] given
/// token_ids[0..i].
struct Score {
  std::vector<std::int64_t> token_ids;
  std::vector<float> token_logprobs;
  std::int64_t cluster_id = 0;

  /// Log-probability of the whole text, given its first token.
  [[nodiscard]] CHAMELEON_EXPORT double logprob() const;
  /// NaN for a text of one token, which has no predicted token.
  [[nodiscard]] CHAMELEON_EXPORT double perplexity() const;
};

}  // namespace chameleon
