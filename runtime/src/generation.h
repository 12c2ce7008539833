#pragma once

#include "chameleon/runtime.h"
#include "sampling.h"

namespace chameleon {

/// The state of a row while it is being generated.
class Row {
 public:
  /// index: its place among the caller's rows
  /// prompt: must outlive this
  Row(std::size_t index, std::span<const std::int64_t> prompt, std::int64_t limit, const Sampling& sampling,
      std::uint64_t stream, std::int64_t cluster_id);

  [[nodiscard]] std::size_t index() const { return index_; }
  [[nodiscard]] std::span<const std::int64_t> prompt() const { return prompt_; }
  [[nodiscard]] std::span<const std::int64_t> token_ids() const { return generation_.token_ids; }
  [[nodiscard]] std::int64_t cluster_id() const { return generation_.cluster_id; }
  /// The last token, which the decoder has not read yet.
  [[nodiscard]] std::int64_t last_token_id() const { return (token_ids().empty() ? prompt_ : token_ids()).back(); }
  /// How many of its tokens a cache must hold: the last new one is never fed back.
  [[nodiscard]] std::size_t capacity() const { return prompt_.size() + limit_ - 1; }

  /// The next token. Throws NumericError, InputError, or what Sampling::allowed_tokens throws.
  [[nodiscard]] Choice choose(std::span<const float> logits) const;
  /// Append the chosen token. The row has ended if the returned Token has a Generation.
  Token append(Choice choice, const Tokenizer& tokenizer, std::int64_t eos_token_id);
  /// End the row without another token.
  Token end(FinishReason reason, std::optional<Error> error = {});

 private:
  [[nodiscard]] bool is_stop_token(std::int64_t token_id, std::int64_t eos_token_id) const;
  /// Text that the caller has not been given. What may begin a stop string is held back.
  [[nodiscard]] std::string take_text(bool finished);
  [[nodiscard]] std::size_t held_back();

  std::size_t index_;
  std::span<const std::int64_t> prompt_;
  std::size_t limit_;
  Sampler sampler_;
  DecodeStream stream_;
  std::size_t shown_ = 0;           // bytes of the text that the caller has been given
  std::vector<std::size_t> begun_;  // where the text may begin each stop string, at the earliest
  Generation generation_;
};

/// Throws InputError for fields that are wrong for any prompts.
void check(const Generate& generate);

/// Rows for each prompt, in order; those of one prompt are adjacent.
/// prompts: must outlive the rows
/// generate: checked
/// capacity: tokens that a row can hold
/// Throws InputError or TokenError.
std::vector<Row> begin_rows(std::span<const TokenIds> prompts, std::span<const std::int64_t> cluster_ids,
                            const Generate& generate, std::size_t capacity, std::int64_t vocab_size);

}  // namespace chameleon
