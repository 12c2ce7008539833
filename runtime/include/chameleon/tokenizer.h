#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "chameleon/export.h"

namespace chameleon {

/// Reads the tokenizer.json of Hugging Face `tokenizers` and gives the same results: BPE in bytes or with byte
/// fallback, and WordPiece; docs/bundle-format.md lists the parts. Immutable: one tokenizer serves any number of
/// threads.
class CHAMELEON_EXPORT Tokenizer {
 public:
  /// Throws ManifestError for JSON that is no such tokenizer, or that has a part or a pattern that is not taken.
  explicit Tokenizer(std::string_view json);
  Tokenizer(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Token ids of a text. Added tokens in the text are recognised. add_special_tokens: with those that the file puts
  /// around a text, as many models' `<bos>` before it. Throws InputError for invalid UTF-8, and for a text that takes
  /// too much work to split.
  [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text, bool add_special_tokens = true) const;

  /// The text of token ids. Invalid UTF-8 becomes U+FFFD.
  [[nodiscard]] std::string decode(std::span<const std::int64_t> ids, bool skip_special_tokens = true) const;

  /// A token as the file writes it. Empty for unknown ids.
  [[nodiscard]] std::string_view token(std::int64_t id) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

/// The text of one row, token by token: a character is shown when all of its tokens are there. The text of all tokens
/// is that of Tokenizer::decode, except where later tokens change text that was shown (an invalid byte after a valid
/// one, in byte fallback): what was shown stays. As in Python.
class CHAMELEON_EXPORT DecodeStream {
 public:
  explicit DecodeStream(bool skip_special_tokens = true) : skip_special_tokens_(skip_special_tokens) {}

  /// The text that one more token completes.
  std::string step(const Tokenizer& tokenizer, std::int64_t id);

 private:
  bool skip_special_tokens_;
  std::vector<std::int64_t> ids_;  // the last tokens that were shown, and those that were not
  std::size_t num_shown_ = 0;      // how many of them were shown
  std::size_t shown_ = 0;          // characters of the text of those, when they stand alone
};

}  // namespace chameleon
