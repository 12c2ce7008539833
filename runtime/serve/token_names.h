// What a token is called in a response: its text, where no other token has the same.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "chameleon/tokenizer.h"

namespace chameleon::serve {

/// A name for every token id, no two the same. A token that is part of a character is named by its bytes, and tokens of
/// equal text by their ids.
class TokenNames {
 public:
  TokenNames(const Tokenizer& tokenizer, std::int64_t vocab_size);
  [[nodiscard]] const std::string& operator[](std::int64_t id) const { return names_[static_cast<std::size_t>(id)]; }

 private:
  std::vector<std::string> names_;
};

/// The name "token_id:N".
std::string name_by_id(std::int64_t id);

}  // namespace chameleon::serve
