#pragma once

#include <span>

#include "chameleon/sampling.h"

namespace chameleon {

/// Throws InputError for a setting out of range.
void check(const Sampling& sampling);

/// The number in [0, 1) that decides step `step` of stream `stream`.
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step);

/// The next token id, specified so exactly that Python and C++ choose the same one
/// (chameleon_deploy/runtime/sampling.py states the steps).
///
/// logits  [vocab]; the repetition penalty is applied in place
/// seen    the row's tokens so far, each once
/// u       in [0, 1), from `uniform`; not used when greedy
///
/// Throws NumericError when a logit is not finite.
std::int64_t choose(std::span<float> logits, std::span<const std::int64_t> seen, const Sampling& sampling, double u);

/// Index of the highest value, the first of equals; of the first NaN where there is one, as numpy has it.
std::size_t argmax(std::span<const float> values);

}  // namespace chameleon
