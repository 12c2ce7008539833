#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "chameleon/export.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// lora_A [count, rank, hidden] and lora_B [count, rank, vocab], alpha in them. Immutable and shared, so copies are
/// cheap.
struct FactorSets {
  std::int64_t count = 0;
  std::int64_t rank = 0;
  std::span<const float> lora_A;
  std::span<const float> lora_B;
  std::shared_ptr<const void> owner;  ///< keeps the two spans alive
};

/// Factor sets that own their values.
CHAMELEON_EXPORT FactorSets make_factor_sets(std::int64_t count, std::int64_t rank, std::vector<float> lora_A,
                                             std::vector<float> lora_B);

/// An opened bundle: every check has passed.
struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  std::string digest;                    ///< SHA-256 of bundle.json, which holds the digests of all other files
  std::span<const std::byte> embedding;  ///< the token embedding [vocab, hidden], memory-mapped
  std::vector<float> centroids;          ///< [num_clusters, hidden]
  FactorSets lora;                       ///< the trained pair of a bundle of regime lora, else empty
  std::shared_ptr<const void> mapping;   ///< keeps `embedding` alive

  /// The graph of a role for a provider; one made for fewer providers is the more special and wins.
  /// Throws ManifestError when there is none.
  [[nodiscard]] CHAMELEON_EXPORT const GraphSpec& graph(std::string_view role, std::string_view provider) const;
};

/// Read the manifest and check every file against it.
/// Throws BundleNotFoundError, ManifestError, VersionError, PathError, UnknownFileError, MissingFileError, DigestError
/// or TensorError.
CHAMELEON_EXPORT Bundle open_bundle(const std::filesystem::path& path);

}  // namespace chameleon
