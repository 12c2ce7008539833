#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

namespace chameleon {

struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};

/// The ids of a model's tokens.
using Vocabulary = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

}  // namespace chameleon
