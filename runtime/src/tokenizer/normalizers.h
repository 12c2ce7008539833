#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/unicode_regex.h"

namespace chameleon {

struct Nfc {
  bool compatibility = false;  ///< NFKC
};

struct Prepend {
  std::string prefix;
};

/// Also a decoder, of each token.
struct Replace {
  Regex pattern;
  std::string content;

  [[nodiscard]] std::string operator()(std::string_view text) const;
};

struct Strip {
  bool left = false;
  bool right = false;
};

struct BertNormalizer {
  bool clean_text = false;
  bool handle_chinese_chars = false;
  bool strip_accents = false;
  bool lowercase = false;
};

using Normalizer = std::variant<Nfc, Prepend, Replace, Strip, BertNormalizer>;

/// The text after all normalizers, as `tokenizers` gives it. text: valid UTF-8
std::string normalize(const std::vector<Normalizer>& normalizers, std::string_view text);

}  // namespace chameleon
