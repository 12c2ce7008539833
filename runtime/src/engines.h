// The TensorRT engines of a bundle in the local cache, where `export --target tensorrt` puts them.
#pragma once

#include <filesystem>
#include <string>

#include "chameleon/bundle.h"

namespace chameleon {

/// What an engine is made by and for, in the words of its cache entry's key.
struct EngineTarget {
  std::string builder;             ///< library and version: "tensorrt 11.1.0.106"
  std::string device;              ///< the GPU's name
  std::string compute_capability;  ///< "9.0"
  std::string driver;              ///< the newest CUDA version that the driver supports: "13.0"
};

/// The directory that holds the engines of exactly this bundle and target. Key, sizes and digests have been checked, so
/// that nothing else is ever deserialised. Throws ProviderError when there is none.
std::filesystem::path find_engines(const Bundle& bundle, const EngineTarget& target);

}  // namespace chameleon
