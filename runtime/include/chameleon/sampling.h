#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace chameleon {

/// How the tokens of a row are chosen and when it stops.
struct Sampling {
  double temperature = 0;                      ///< 0 is greedy, else at least 1e-5
  std::int64_t top_k = 0;                      ///< 0 keeps all
  double top_p = 1;                            ///< 1 keeps all
  double repetition_penalty = 1;               ///< 1 leaves the logits alone
  std::uint64_t seed = 0;                      ///< the same seed gives the same tokens, here and in Python
  std::vector<std::int64_t> stop_token_ids{};  ///< stop after one of these, besides the model's end of text
  std::vector<std::string> stop{};             ///< stop before one of these strings
};

}  // namespace chameleon
