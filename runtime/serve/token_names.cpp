#include "token_names.h"

#include <unordered_map>

#include "utf8.h"

namespace chameleon::serve {

namespace {

/// Empty for an id that the tokenizer does not know.
std::string text_of(const Tokenizer& tokenizer, std::int64_t id) {
  const std::string_view bytes = tokenizer.bytes(id);
  if (bytes.empty()) return std::string(tokenizer.token(id));
  if (!find_invalid_utf8(bytes)) return std::string(bytes);
  std::string name = "bytes:";
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    name += {'\\', 'x', "0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  }
  return name;
}

}  // namespace

TokenNames::TokenNames(const Tokenizer& tokenizer, std::int64_t vocab_size) {
  std::unordered_map<std::string, int> times;
  for (std::int64_t id = 0; id < vocab_size; ++id) ++times[names_.emplace_back(text_of(tokenizer, id))];
  for (std::int64_t id = 0; id < vocab_size; ++id) {
    std::string& name = names_[static_cast<std::size_t>(id)];
    if (name.empty() || times[name] > 1) name = name_by_id(id);
  }
}

std::string name_by_id(std::int64_t id) { return "token_id:" + std::to_string(id); }

}  // namespace chameleon::serve
