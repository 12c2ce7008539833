// Log-probabilities of texts, and of the tokens of a prompt, each with its most probable alternatives.
#pragma once

#include "chameleon/runtime.h"
#include "decode/decoder.h"

namespace chameleon {

/// Scores in the order of the rows. The batch is adapted as a whole and decoded in passes of bounded memory.
/// Throws NumericError, or CancelledError when the stop is requested.
std::vector<Score> score_rows(std::span<const TokenIds> rows, const Decoder& decoder, const Adaptation& adaptation,
                              const std::stop_token& stop);

/// See Runtime::prompt_logprobs.
std::vector<std::vector<Choice>> prompt_logprobs(std::span<const TokenIds> texts, const Decoder& decoder,
                                                 const RowFactors& factors, int count, const std::stop_token& stop);

}  // namespace chameleon
