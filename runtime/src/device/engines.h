// Finds the TensorRT engines of a bundle in the local cache, where `export --target tensorrt` writes them.
#pragma once

#include <filesystem>
#include <string>

#include "chameleon/bundle.h"

namespace chameleon {

/// The library that builds an engine and the GPU that runs it, as strings of the cache entry's key.
struct EngineTarget {
  std::string builder;             ///< library and version: "tensorrt 11.1.0.106"
  std::string device;              ///< the GPU's name
  std::string compute_capability;  ///< "9.0"
  std::string driver;              ///< the newest CUDA version that the driver supports: "13.0"
};

/// The directory with the engines of exactly this bundle and target. Key, sizes and digests are checked before anything
/// is deserialised. Throws ProviderError when there is none, PathError when others can write to the cache.
std::filesystem::path find_engines(const Bundle& bundle, const EngineTarget& target);

}  // namespace chameleon
