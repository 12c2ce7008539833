// The GPU and the TensorRT library of this process.
#pragma once

#include "device/engines.h"

namespace chameleon {

/// The target of engines for the first visible GPU, as `export --target tensorrt` records it in the key.
/// Throws ProviderError without a driver or a GPU.
EngineTarget current_target();

}  // namespace chameleon
