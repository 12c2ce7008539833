#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/unicode_regex.h"

namespace chameleon {

/// A token that is found in the text before the model reads it, such as <|endoftext|>.
struct AddedToken {
  std::int64_t id = 0;
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
  bool special = false;
};

/// A part of a text: an added token, or text for the model.
struct Piece {
  std::string_view text;
  std::optional<std::int64_t> token;
};

/// Finds added tokens in a text: leftmost first, and the longest of those that start at the same place.
class AddedTokens {
 public:
  /// Throws ManifestError if two tokens have one content, or one has none.
  explicit AddedTokens(std::vector<AddedToken> tokens);

  [[nodiscard]] std::vector<Piece> split(std::string_view text) const;

 private:
  struct Match {
    const AddedToken* token;
    Span span;
  };
  [[nodiscard]] std::optional<Match> find(std::string_view text, std::size_t start) const;

  std::vector<AddedToken> tokens_;
  // A trie of bytes: the node after a node and a byte, and the token that ends at a node, or -1.
  std::unordered_map<std::uint64_t, std::uint32_t> nodes_;
  std::vector<std::int32_t> ends_ = {-1};
  std::array<bool, 256> is_first_byte_{};
};

}  // namespace chameleon
