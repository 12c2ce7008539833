#pragma once

#include "chameleon/scoring.h"
#include "decoder.h"

namespace chameleon {

/// Scores in the order of the rows. The batch was adapted as a whole; it is decoded in passes of bounded memory.
/// Throws NumericError.
std::vector<Score> score_rows(std::span<const TokenIds> rows, const Decoder& decoder, const Adaptation& adaptation);

}  // namespace chameleon
