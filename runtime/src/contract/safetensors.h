#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace chameleon {

/// A tensor in a file: its values are little-endian and row-major.
struct SafeTensor {
  std::string dtype;  ///< such as "F32"
  std::vector<std::int64_t> shape;
  std::string_view bytes;

  /// All values. Throws TensorError unless they are float32 of this shape, and finite.
  [[nodiscard]] std::vector<float> floats(std::span<const std::int64_t> expected, const std::string& what) const;
};

/// A .safetensors file (https://github.com/huggingface/safetensors#format).
struct SafeTensors {
  std::map<std::string, SafeTensor> tensors;  ///< valid as long as the file's content
  std::map<std::string, std::string> metadata;
};

/// Read the header, and check that the tensors are as large as their shapes and cover the file.
/// Throws TensorError; `where` is named in messages.
SafeTensors parse_safetensors(std::string_view content, const std::string& where);

/// The values of a file that must contain exactly these tensors, float32 and finite. Throws TensorError.
std::map<std::string, std::vector<float>> read_safetensors(
    std::string_view content, const std::string& where, const std::map<std::string, std::vector<std::int64_t>>& shapes);

}  // namespace chameleon
