// A tokenizer.json of the parts that the runtimes have: the counterpart of chameleon_deploy/runtime/tokenizer_file.py.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "contract/json_fields.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoders.h"
#include "tokenizer/normalizers.h"
#include "tokenizer/pre_tokenizers.h"
#include "tokenizer/wordpiece.h"

namespace chameleon {

/// The tokens that a template puts around a text.
struct SpecialTokens {
  std::vector<std::int64_t> prefix_ids, suffix_ids;
};

struct TokenizerFile {
  std::vector<AddedToken> added_tokens;
  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  std::vector<TokenDecoder> decoders;
  SpecialTokens special_tokens;
  std::variant<Bpe, WordPiece> model;
};

/// Read a tokenizer.json: every field, its type, and nothing else, as in Python. Throws ManifestError.
TokenizerFile read_tokenizer_file(const Json& json);

}  // namespace chameleon
