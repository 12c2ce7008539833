// The fields of a tokenizer.json: the counterpart of chameleon_deploy/runtime/tokenizer_file.py.
#pragma once

#include <string>

#include "contract/json_fields.h"
#include "tokenizer/added_tokens.h"

namespace chameleon {

constexpr std::int64_t kMaxTokenId = (1 << 24) - 1;  // bounds the tables of tokens; no vocabulary is that large

/// Check a tokenizer.json of byte-level BPE: every field, its type, and nothing else, as in Python. Throws
/// ManifestError.
void check_tokenizer_file(const Json& json);

void read(const Json& json, const std::string& at, AddedToken& token);

}  // namespace chameleon
