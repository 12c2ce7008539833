// Drafts for speculative decoding: what followed a row's last tokens before (prompt lookup).
//
// A call that reads several tokens costs little more than a step of one while it is bound by reading the weights: while
// one row is generated. So the decoder reads that row's last token and a draft in one call, and the draft's tokens that
// would have been chosen anyway are kept: the result is that of plain decoding, with the same random numbers.
#pragma once

#include <map>

#include "decode/decoder.h"

namespace chameleon {

/// The tokens of a row, and where each of their n-grams occurred last.
class PromptLookup {
 public:
  explicit PromptLookup(std::span<const std::int64_t> prompt);
  /// Append those of the generated tokens that are not here yet.
  void extend(std::span<const std::int64_t> generated);
  /// Up to `limit` tokens that followed the last tokens where they occurred before.
  [[nodiscard]] std::vector<std::int64_t> draft(std::size_t limit) const;

 private:
  void append(std::int64_t token_id);
  [[nodiscard]] std::vector<std::int64_t> suffix(std::size_t length) const;

  std::size_t prompt_;  // its length
  std::vector<std::int64_t> token_ids_;
  std::map<std::vector<std::int64_t>, std::size_t> follows_;  // n-gram -> index of the token after it
};

/// Throws ProviderError or InputError if drafts are asked for of a decoder that would read them to other tokens.
void check_drafts(std::int64_t draft_tokens, const Decoder& decoder);

}  // namespace chameleon
