#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "chameleon/export.h"
#include "chameleon/factors.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// What tells one state of a file from another.
struct FileStamp {
  std::int64_t device, inode, size, modified;  ///< modified: in nanoseconds since 1970
  bool operator==(const FileStamp&) const = default;
};

/// What an int8 graph does to the inputs and outputs of a linear layer, and so to its factors (docs/bundle-format.md).
struct TargetBasis {
  std::vector<float> in_before;          ///< [in_features]
  std::int64_t in_block = 1;             ///< channels that a Hadamard matrix rotates together: 1, 4, 16 or 64
  std::vector<float> in_after;           ///< [in_features]
  std::vector<std::int64_t> out_blocks;  ///< the same for equal parts of the outputs
  std::vector<float> out_after;          ///< [out_features]
};

/// An opened bundle, whose checks have all passed.
struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  std::string digest;                         ///< SHA-256 of bundle.json, which holds the digests of all other files
  std::span<const std::byte> embedding;       ///< the token embedding [vocab, hidden], memory-mapped
  std::span<const std::byte> row_scales;      ///< of its rows in int8, float32 [vocab]; else empty
  std::span<const std::byte> channel_scales;  ///< of its channels in int8, float32 [hidden]; else empty
  std::vector<float> centroids;               ///< [num_clusters, hidden]
  FactorSets lora;                            ///< the trained sets of a bundle of regime lora, else empty
  std::map<std::string, TargetBasis> basis;   ///< by target, in an int8 bundle with targets other than lm_head
  std::shared_ptr<const void> mapping;        ///< keeps `embedding` and its scales alive
  std::map<std::string, FileStamp> stamps;    ///< of the manifest and the weights

  /// The graph of a role for a provider: of several, the one made for the fewest providers.
  /// Throws ManifestError when there is none.
  [[nodiscard]] CHAMELEON_EXPORT const GraphSpec& graph(std::string_view role, std::string_view provider) const;

  /// Compare the manifest and the weights with what was opened, by size, modification time and inode. The weights are
  /// mapped from the file: changing it in place changes results, and truncating it ends the process. A service calls
  /// this from time to time and loads the bundle again if it fails; it takes microseconds. Throws BundleChangedError.
  CHAMELEON_EXPORT void check_unchanged() const;
};

/// PEM files, each with one Ed25519 public key; nothing accepts bundles without a signature.
using TrustedKeys = std::optional<std::vector<std::filesystem::path>>;

/// Read the manifest and check every file against it. A bundle that none of the trusted keys signed is refused.
/// Throws BundleNotFoundError, SignatureError, ManifestError, VersionError, PathError, UnknownFileError,
/// MissingFileError, DigestError, TensorError or GraphError.
CHAMELEON_EXPORT Bundle open_bundle(const std::filesystem::path& path, const TrustedKeys& trusted_keys = {});

}  // namespace chameleon
