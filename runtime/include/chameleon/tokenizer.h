#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "chameleon/export.h"

namespace chameleon {

/// Byte-level BPE as in GPT-2, or as in SmolLM, where each digit is a word. Reads the tokenizer.json of Hugging Face
/// `tokenizers` and gives the same results. Immutable: one tokenizer serves any number of threads.
class CHAMELEON_EXPORT Tokenizer {
 public:
  /// Throws ManifestError for JSON that is not a byte-level BPE tokenizer, or that uses an unsupported option.
  explicit Tokenizer(std::string_view json);
  Tokenizer(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Token ids of a text. Added tokens in the text are recognised; no token is added. Throws InputError for invalid
  /// UTF-8.
  [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text) const;

  /// The text of token ids. Invalid UTF-8 becomes U+FFFD.
  [[nodiscard]] std::string decode(std::span<const std::int64_t> ids, bool skip_special_tokens = true) const;

  /// The bytes of one token, which may be part of a character. Empty for special tokens and unknown ids.
  [[nodiscard]] std::string_view bytes(std::int64_t id) const;

  /// A token as the vocabulary writes it, in GPT-2's alphabet of bytes. Empty for unknown ids.
  [[nodiscard]] std::string_view token(std::int64_t id) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace chameleon
