#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace chameleon {

/// Byte-pair encoding (Sennrich et al., 2016), as `tokenizers` has it.
class Bpe {
 public:
  struct Options {
    std::optional<std::string> unk_token;
    bool fuse_unk = false;
    bool byte_fallback = false;
    bool ignore_merges = false;
  };
  /// merges: in order of priority, highest first. Throws ManifestError for a merge or an unknown token that the
  /// vocabulary lacks.
  Bpe(Vocabulary vocabulary, const std::vector<std::pair<std::string, std::string>>& merges, const Options& options);

  [[nodiscard]] const Vocabulary& vocabulary() const { return vocabulary_; }

  /// Append the token ids of one word. A character without a token is written in bytes, or is the unknown token, or is
  /// left out.
  void encode(std::string_view word, std::vector<std::int64_t>& ids) const;

 private:
  struct Merge {
    std::uint64_t pair = kNoPair;
    std::int32_t rank = 0;
    std::int32_t merged = 0;
  };
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};
  /// A token of the word so far, in a doubly linked list; id is -1 once it has become part of its left neighbour.
  struct Symbol {
    std::int32_t id;
    std::int32_t previous;
    std::int32_t next;
  };

  void add_merge(const Merge& merge);
  [[nodiscard]] const Merge* find(std::int32_t left, std::int32_t right) const;
  [[nodiscard]] std::size_t slot(std::uint64_t pair) const;
  void split(std::string_view word, std::vector<Symbol>& symbols) const;

  Vocabulary vocabulary_;
  std::vector<std::int32_t> characters_;  // tokens of one character, by code points below its size; -1 for none
  std::vector<std::int32_t> bytes_;       // tokens <0x00> to <0xFF>, or none
  std::int32_t unk_ = -1;
  bool fuse_unk_, ignore_merges_;
  std::vector<Merge> merges_;  // a hash table with open addressing: looking merges up is most of the work
};

}  // namespace chameleon
