// The logprobs object of a choice.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "chameleon/sampling.h"
#include "chameleon/tokenizer.h"
#include "errors.h"

namespace chameleon::serve {

/// Writes the tokens of one row, in as many parts as a stream needs.
class LogprobsWriter {
 public:
  using Name = std::function<std::string(std::int64_t)>;

  /// name: of a token id
  /// offset: characters before the next token
  /// with_special_tokens: whether they are part of the text
  LogprobsWriter(const Tokenizer& tokenizer, Name name, std::size_t offset = 0, bool with_special_tokens = false)
      : tokenizer_(tokenizer), name_(std::move(name)), offset_(offset), with_special_tokens_(with_special_tokens) {}

  /// A choice without log-probability is the first token of a prompt.
  Json write(std::span<const Choice> choices);

 private:
  /// The alternatives, and the token itself where it is none of them.
  [[nodiscard]] Json top(const Choice& choice) const;

  const Tokenizer& tokenizer_;
  Name name_;
  std::size_t offset_;
  bool with_special_tokens_;
  std::string unfinished_;  // bytes of a character whose end is in a later token
};

/// The number of characters of a text.
std::size_t num_characters(std::string_view text);

/// Two parts as one.
Json join_logprobs(Json first, const Json& second);

}  // namespace chameleon::serve
