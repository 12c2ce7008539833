// Adapter files: one low-rank update for bundles of one base model, in safetensors (docs/bundle-format.md).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "chameleon/bundle.h"

namespace chameleon {

/// The largest rank of an adapter, or of several that a row blends.
std::int64_t max_rank(const AdaptationSpec& spec);

/// What an adapter file holds.
struct StoredAdapter {
  FactorSets set;                               ///< one, with zeros for the targets that it lacks
  std::vector<std::int64_t> invocation_tokens;  ///< of an activated adapter, else none
  std::string digest;                           ///< SHA-256 of the file
};

/// Read an adapter of a model of so many tokens.
/// Throws AdapterError for a file that is not an adapter of this bundle, TensorError for tensors that do not fit.
StoredAdapter read_adapter(const std::filesystem::path& file, const AdaptationSpec& spec, std::int64_t vocab_size);

}  // namespace chameleon
