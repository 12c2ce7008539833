// Log-probabilities from logits, for a decoder without a scorer.
#pragma once

#include <functional>

#include "decoder.h"

namespace chameleon {

/// See Decoder::token_logprobs.
/// max_rows: of one call; all_logits: [batch, positions, vocab] of every position of some rows
std::vector<std::vector<float>> logprobs_of_logits(
    Rows rows, const RowFactors& factors, std::size_t max_rows, const std::stop_token& stop,
    const std::function<Logits(Rows rows, const RowFactors& factors)>& all_logits);

}  // namespace chameleon
