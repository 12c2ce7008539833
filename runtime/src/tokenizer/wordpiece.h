#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace chameleon {

/// WordPiece (Devlin et al., 2019): the longest token that begins a word, then the longest that goes on.
class WordPiece {
 public:
  /// Throws ManifestError if the vocabulary lacks the unknown token.
  WordPiece(Vocabulary vocabulary, const std::string& unk_token, std::string continuing_subword_prefix,
            std::size_t max_input_chars_per_word);

  [[nodiscard]] const Vocabulary& vocabulary() const { return vocabulary_; }

  /// Append the token ids of one word: the unknown token alone for a word that is too long or has an unknown part.
  void encode(std::string_view word, std::vector<std::int64_t>& ids) const;

 private:
  Vocabulary vocabulary_;
  std::int32_t unk_;
  std::string prefix_;
  std::size_t max_characters_;
};

}  // namespace chameleon
