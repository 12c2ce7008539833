// Log-probabilities from logits, for a decoder without a scorer graph.
#pragma once

#include <functional>

#include "decode/decoder.h"

namespace chameleon {

/// See Decoder::token_logprobs.
/// max_rows: the largest number of rows of one call
/// all_logits: returns the logits of every position of some rows, [batch, positions, vocab]
std::vector<std::vector<float>> logprobs_of_logits(
    Rows rows, const RowFactors& factors, std::size_t max_rows, const std::stop_token& stop,
    const std::function<Logits(Rows rows, const RowFactors& factors)>& all_logits);

}  // namespace chameleon
