#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/unicode_regex.h"

namespace chameleon {

/// A token that is found in the text before BPE, such as <|endoftext|>.
struct AddedToken {
  std::int64_t id = 0;
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
  bool special = false;
};

/// A part of a text: an added token, or text for BPE.
struct Piece {
  std::string_view text;
  std::optional<std::int64_t> token;
};

/// Split a text at these tokens: leftmost first, and the longest of those that start at the same place.
std::vector<Piece> split_at(std::string_view text, const std::vector<AddedToken>& tokens);

}  // namespace chameleon
