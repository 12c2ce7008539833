// Log-probabilities of the tokens of a prompt, each with its most probable alternatives.
#pragma once

#include "chameleon/runtime.h"
#include "decode/decoder.h"

namespace chameleon {

/// See Runtime::prompt_logprobs.
std::vector<std::vector<Choice>> prompt_logprobs(std::span<const TokenIds> texts, const Decoder& decoder,
                                                 const RowFactors& factors, int count, const std::stop_token& stop);

}  // namespace chameleon
