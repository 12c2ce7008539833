#pragma once

#include "chameleon/runtime.h"
#include "decoder.h"
#include "sampling.h"

namespace chameleon {

/// A row during generation.
class Row {
 public:
  Row(std::span<const std::int64_t> prompt, std::int64_t limit, const Sampling& sampling, std::uint64_t stream,
      std::int64_t cluster_id);

  [[nodiscard]] const Sampler& sampler() const { return sampler_; }

  /// Take the chosen token into the text. True when the row is finished.
  bool append(const Choice& choice, const Tokenizer& tokenizer, std::int64_t eos_token_id);

  /// Text that was not given out before and can be now.
  [[nodiscard]] std::string_view take_text();

  void cancel();
  [[nodiscard]] Generation& generation() { return generation_; }
  [[nodiscard]] std::span<const std::int64_t> prompt() const { return prompt_; }
  /// How many of its tokens a cache must hold: the last new one is never fed back.
  [[nodiscard]] std::size_t capacity() const { return prompt_.size() + limit_ - 1; }

 private:
  [[nodiscard]] bool is_stop_token(std::int64_t token_id, std::int64_t eos_token_id) const;
  [[nodiscard]] std::size_t held_back() const;

  std::span<const std::int64_t> prompt_;
  std::size_t limit_;
  const Sampling& sampling_;
  Sampler sampler_;
  std::string pending_;    // bytes of a character that is not complete yet
  std::size_t shown_ = 0;  // bytes of the text that the caller has been given
  bool finished_ = false;
  Generation generation_;
};

/// Sample, stop, drop finished rows, decode one step, again.
void stream_tokens(std::span<Row> rows, const Decoder& decoder, const Adaptation& adaptation,
                   const Tokenizer& tokenizer, std::int64_t eos_token_id, const OnToken& on_token,
                   const std::stop_token& stop);

}  // namespace chameleon
