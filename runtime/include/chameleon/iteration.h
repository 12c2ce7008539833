#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/generation.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// A row that ended.
struct FinishedRow {
  Mode mode;
  std::int64_t cluster_id;
  FinishReason finish_reason;
  std::size_t prompt_tokens, new_tokens;  ///< numbers of tokens
  Seconds seconds;                        ///< from its submit to its end
  /// From its submit to its admission, and to its first token; none without that.
  std::optional<Seconds> queued{}, first_token{};
  std::vector<std::string> adapters{};  ///< names of its adapters, of all where it blends several
  std::string tenant{};                 ///< the name of its tenant
};

/// The record of one engine iteration, for metrics.
struct Iteration {
  std::size_t rows = 0;               ///< rows that were given a token, or failed; most of them by the decoder's step
  std::size_t factor_sets = 0;        ///< resident during the step
  std::size_t factor_set_hits = 0;    ///< admitted rows whose factor set was resident already
  std::size_t prefilled_tokens = 0;   ///< prefilled prompt tokens
  Seconds chunk{};                    ///< time of the prefill, with copies of prompts for more continuations
  Seconds step{};                     ///< time of the decoder's step
  std::vector<Seconds> queued;        ///< time from submit to admission, of every admitted row
  std::vector<Seconds> first_tokens;  ///< time from submit to the first token, of every row that got it
  std::vector<Seconds> later_tokens;  ///< time since the token before it, of every later token
  std::vector<FinishedRow> finished;  ///< rows that ended, for any reason
};

}  // namespace chameleon
