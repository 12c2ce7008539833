#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "chameleon/export.h"
#include "chameleon/factors.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// An opened bundle, whose checks have all passed.
struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  std::string digest;                    ///< SHA-256 of bundle.json, which holds the digests of all other files
  std::span<const std::byte> embedding;  ///< the token embedding [vocab, hidden], memory-mapped
  std::span<const std::byte> row_scales;      ///< of its rows in int8, float32 [vocab]; else empty
  std::span<const std::byte> channel_scales;  ///< of its channels in int8, float32 [hidden]; else empty
  std::vector<float> centroids;          ///< [num_clusters, hidden]
  FactorSets lora;                       ///< the trained adapters of a bundle of regime lora, else empty
  std::shared_ptr<const void> mapping;   ///< keeps `embedding` and its scales alive

  /// The graph of a role for a provider: of several, the one made for the fewest providers.
  /// Throws ManifestError when there is none.
  [[nodiscard]] CHAMELEON_EXPORT const GraphSpec& graph(std::string_view role, std::string_view provider) const;
};

/// Read the manifest and check every file against it.
/// Throws BundleNotFoundError, ManifestError, VersionError, PathError, UnknownFileError, MissingFileError, DigestError
/// or TensorError. The graphs' files are checked when a runtime opens them.
CHAMELEON_EXPORT Bundle open_bundle(const std::filesystem::path& path);

}  // namespace chameleon
