// PEFT LoRA directories: low-rank updates of any linear layers, read as they are (docs/python-api.md#adapters).
#pragma once

#include <filesystem>
#include <string_view>

#include "contract/adapter_file.h"

namespace chameleon {

/// The files of a directory.
struct PeftFiles {
  std::string_view config;   ///< adapter_config.json
  std::string_view tensors;  ///< adapter_model.safetensors
};

/// Read an adapter for a bundle. Only plain low-rank updates are read: y + scaling * (x A^T) B^T, of a whole text or,
/// if activated, from its last invocation on. Everything else that PEFT can put into a directory is refused by the name
/// of its option or tensor, in the words of the Python runtime, and so is an option that this release does not know.
/// The scaling is multiplied into B; layers of a smaller rank than the largest are padded with zeros, and so are
/// layers that it does not adapt. Its digest is of the configuration and the tensors, one after the other.
/// Throws CheckpointError for a configuration that is not a plain LoRA, TensorError for tensors that do not fit it, and
/// AdapterError where the bundle does not take it.
StoredAdapter read_peft(const std::filesystem::path& directory, const Bundle& bundle);

/// The same, of files that have been read from a directory.
StoredAdapter parse_peft(const PeftFiles& files, const std::filesystem::path& directory, const Bundle& bundle);

}  // namespace chameleon
