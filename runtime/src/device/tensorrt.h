// EXPERIMENTAL: a decoder on a native TensorRT engine. It has been compiled but has never run on a GPU.
//
// Part of the library where TensorRT is configured with -DCHAMELEON_TENSORRT_ROOT=.
#pragma once

#include <memory>

#include "chameleon/bundle.h"
#include "decode/decoder.h"

namespace chameleon {

/// The decoder of a bundle on the first visible GPU, with the engine that `engines` built for it.
/// The key-value cache stays on the GPU. Factors are copied to the GPU once per batch, logits to the host at each step.
/// Throws ProviderError, whose message names the missing part, or DeviceError.
std::unique_ptr<const Decoder> open_tensorrt(const Bundle& bundle);

}  // namespace chameleon
