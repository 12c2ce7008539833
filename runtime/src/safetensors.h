#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace chameleon {

/// Read a .safetensors file (https://github.com/huggingface/safetensors#format). It must contain exactly these tensors,
/// float32 and finite. Throws TensorError; `where` is named in messages.
std::map<std::string, std::vector<float>> read_safetensors(
    std::string_view content, const std::string& where, const std::map<std::string, std::vector<std::int64_t>>& shapes);

}  // namespace chameleon
