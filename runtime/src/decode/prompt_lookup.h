// Speculative decoding of a single row, whose draft is what followed the row's last tokens before (prompt lookup).
//
// A step that reads several tokens costs little more than a step of one while it is bound by reading the weights. So
// the model reads its last token and a draft in one call, and the draft's tokens that it would have chosen itself are
// kept: the result is that of plain decoding, with the same random numbers, up to the rounding of a call of
// several tokens.
#pragma once

#include <map>

#include "generation.h"

namespace chameleon {

/// The tokens of a row, and where each of their n-grams occurred last.
class PromptLookup {
 public:
  explicit PromptLookup(std::span<const std::int64_t> token_ids);
  void append(std::int64_t token_id);
  /// Up to `limit` tokens that followed the last tokens where they occurred before.
  [[nodiscard]] std::span<const std::int64_t> draft(std::size_t limit) const;

 private:
  [[nodiscard]] std::vector<std::int64_t> suffix(std::size_t length) const;

  std::vector<std::int64_t> token_ids_;
  std::map<std::vector<std::int64_t>, std::size_t> follows_;  // n-gram -> index of the token after it
};

/// Generate a single row. Arguments as in generate_rows.
/// draft_tokens: how many tokens to draft for a call, at most
/// Throws InputError for another number of rows or tokens, ProviderError for a decoder that reads no draft.
std::vector<Generation> generate_speculated(std::vector<Row> rows, std::int64_t draft_tokens, const Decoder& decoder,
                                            const RowFactors& factors, const Tokenizer& tokenizer,
                                            std::int64_t eos_token_id, OnError errors, const OnToken& on_token,
                                            const std::stop_token& stop);

}  // namespace chameleon
