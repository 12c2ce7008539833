// A decoder on a native TensorRT engine. Compiled where its headers are given (-DCHAMELEON_TENSORRT_ROOT=).
#pragma once

#include <memory>

#include "decoder.h"

namespace chameleon {

/// The decoder of a bundle on the first visible GPU, with the engine that `export --target tensorrt` built for it.
/// The key-value cache stays on the GPU. Factors are copied to it once for each batch, logits from it at each step.
/// Throws ProviderError, which says what is missing, or DeviceError.
std::unique_ptr<const Decoder> open_tensorrt(const Bundle& bundle);

}  // namespace chameleon
