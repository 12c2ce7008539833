// Adapter files: one low-rank update for bundles of one base model, in safetensors (docs/bundle-format.md).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "chameleon/bundle.h"

namespace chameleon {

inline constexpr std::int64_t kMaxRank = 1024;  ///< every layer is padded to the largest rank of a call
inline constexpr std::size_t kMaxHeaderBytes = 1U << 20U;

/// The largest rank of an adapter, or of several that a row blends.
std::int64_t max_rank(const AdaptationSpec& spec);

/// Throws TensorError unless a bundle takes adapters of this rank.
void check_rank(const std::string& where, std::int64_t rank, const AdaptationSpec& spec);

/// What an adapter file or a PEFT directory holds.
struct StoredAdapter {
  FactorSets set;                               ///< one, with zeros for the targets that it lacks
  std::vector<std::int64_t> invocation_tokens;  ///< of an activated adapter, else none
  std::string digest;                           ///< SHA-256 of the file, or of the directory's files
};

/// Read an adapter of a model of so many tokens.
/// Throws AdapterError for a file that is not an adapter of this bundle, TensorError for tensors that do not fit.
StoredAdapter read_adapter(const std::filesystem::path& file, const AdaptationSpec& spec, std::int64_t vocab_size);

}  // namespace chameleon
