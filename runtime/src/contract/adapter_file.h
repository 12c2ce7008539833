// Adapter files: one low-rank update for bundles of one base model, in safetensors (docs/bundle-format.md).
#pragma once

#include <filesystem>
#include <string>
#include <utility>

#include "chameleon/bundle.h"

namespace chameleon {

/// The largest rank of an adapter, or of several that a row blends.
std::int64_t max_rank(const AdaptationSpec& spec);

/// The one set of an adapter file, with zeros for the targets that it lacks, and the SHA-256 of the file.
/// Throws AdapterError for a file that is not an adapter of this bundle, TensorError for tensors that do not fit.
std::pair<FactorSets, std::string> read_adapter(const std::filesystem::path& file, const AdaptationSpec& spec);

}  // namespace chameleon
