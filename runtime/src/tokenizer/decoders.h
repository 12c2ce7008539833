#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/normalizers.h"
#include "tokenizer/pre_tokenizers.h"

namespace chameleon {

struct ByteLevelDecoder {};

/// Tokens <0x00> to <0xFF> are bytes.
struct ByteFallback {};

struct Fuse {};

/// Takes up to `start` of one character from the start of each token.
struct StripDecoder {
  std::string character;
  std::int64_t start = 0;
};

struct WordPieceDecoder {
  std::string prefix;
  bool cleanup = false;
};

using TokenDecoder =
    std::variant<ByteLevelDecoder, Replace, ByteFallback, Fuse, StripDecoder, Metaspace, WordPieceDecoder>;

/// The text of tokens. Bytes that are no UTF-8 become U+FFFD.
std::string decode_tokens(const std::vector<TokenDecoder>& decoders, std::vector<std::string> tokens);

}  // namespace chameleon
