#include "tokenizer/wordpiece.h"

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

namespace chameleon {

WordPiece::WordPiece(Vocabulary vocabulary, const std::string& unk_token, std::string continuing_subword_prefix,
                     std::size_t max_input_chars_per_word)
    : vocabulary_(std::move(vocabulary)),
      prefix_(std::move(continuing_subword_prefix)),
      max_characters_(max_input_chars_per_word) {
  const auto found = vocabulary_.find(unk_token);
  if (found == vocabulary_.end()) {
    throw ManifestError("tokenizer.json: model.unk_token: '" + unk_token + "' is not in the vocabulary");
  }
  unk_ = found->second;
}

void WordPiece::encode(std::string_view word, std::vector<std::int64_t>& ids) const {
  if (count_code_points(word) > max_characters_) return ids.push_back(unk_);
  const std::size_t before = ids.size();
  for (std::size_t start = 0; start < word.size();) {
    std::size_t end = word.size();
    auto found = vocabulary_.end();
    while (end > start) {
      const std::string_view part = word.substr(start, end - start);
      found = start == 0 ? vocabulary_.find(part) : vocabulary_.find(prefix_ + std::string(part));
      if (found != vocabulary_.end()) break;
      end = start + last_code_point(part);
    }
    if (found == vocabulary_.end()) {
      ids.resize(before);
      return ids.push_back(unk_);
    }
    ids.push_back(found->second);
    start = end;
  }
}

}  // namespace chameleon
