#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

constexpr std::size_t kDirect = 0x3000;  // code points whose tokens are looked up in a table

std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
}

// A pair of symbols that may be merged, as one number: the lowest is of the lowest rank, the leftmost of those. Texts
// of tokenizers that do not part words are queued whole, and comparing numbers takes half the time of comparing fields.
using Candidate = std::uint64_t;

Candidate candidate(std::int32_t rank, std::int32_t position) {
  return (static_cast<Candidate>(static_cast<std::uint32_t>(rank)) << 32) | static_cast<std::uint32_t>(position);
}

}  // namespace

Bpe::Bpe(Vocabulary vocabulary, const std::vector<std::pair<std::string, std::string>>& merges, const Options& options)
    : vocabulary_(std::move(vocabulary)),
      characters_(kDirect, -1),
      fuse_unk_(options.fuse_unk),
      ignore_merges_(options.ignore_merges) {
  const auto id_of = [&](std::string_view token) {
    const auto found = vocabulary_.find(token);
    return found == vocabulary_.end() ? -1 : found->second;
  };
  for (char32_t c = 0; c < kDirect; ++c) {
    std::string character;
    append_utf8(character, c);
    characters_[c] = id_of(character);
  }
  if (options.byte_fallback) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    for (std::size_t byte = 0; byte < 256; ++byte) {
      bytes_.push_back(id_of(std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + '>'));
    }
  }
  if (options.unk_token) {
    unk_ = id_of(*options.unk_token);
    if (unk_ < 0) {
      throw ManifestError("tokenizer.json: model.unk_token: '" + *options.unk_token + "' is not in the vocabulary");
    }
  }
  merges_.resize(std::bit_ceil(2 * merges.size() + 1));
  std::int32_t rank = 0;
  for (const auto& [left, right] : merges) {
    const std::int32_t left_id = id_of(left), right_id = id_of(right), merged = id_of(left + right);
    if (left_id < 0 || right_id < 0 || merged < 0) {
      throw ManifestError("tokenizer.json: model.merges: '" + left + " " + right + "' is not in the vocabulary");
    }
    add_merge({pair_of(left_id, right_id), rank++, merged});
  }
}

std::size_t Bpe::slot(std::uint64_t pair) const {
  return static_cast<std::size_t>((pair * 0x9E3779B97F4A7C15) >> 20) & (merges_.size() - 1);
}

void Bpe::add_merge(const Merge& merge) {
  std::size_t at = slot(merge.pair);
  while (merges_[at].pair != kNoPair && merges_[at].pair != merge.pair) at = (at + 1) & (merges_.size() - 1);
  merges_[at] = merge;
}

const Bpe::Merge* Bpe::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair = pair_of(left, right);
  std::size_t at = slot(pair);
  while (merges_[at].pair != pair) {
    if (merges_[at].pair == kNoPair) return nullptr;
    at = (at + 1) & (merges_.size() - 1);
  }
  return &merges_[at];
}

/// The characters of a word, or what stands for them.
void Bpe::split(std::string_view word, std::vector<Symbol>& symbols) const {
  const auto add = [&](std::int32_t id) {
    const auto here = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, here - 1, here + 1});
  };
  bool is_unknown = false;  // an unknown token is added when the next known one is, as in `tokenizers`
  for (std::size_t at = 0; at < word.size();) {
    const std::size_t start = at;
    const char32_t code_point = next_code_point(word, at);
    const std::string_view character = word.substr(start, at - start);
    std::int32_t id = -1;
    if (code_point < kDirect) {
      id = characters_[code_point];
    } else if (const auto found = vocabulary_.find(character); found != vocabulary_.end()) {
      id = found->second;
    }
    if (id >= 0) {
      if (is_unknown) add(unk_);
      is_unknown = false;
      add(id);
      continue;
    }
    const auto token_of = [&](char byte) { return bytes_[static_cast<unsigned char>(byte)]; };
    if (!bytes_.empty() && std::ranges::all_of(character, [&](char byte) { return token_of(byte) >= 0; })) {
      for (const char byte : character) add(token_of(byte));
    } else if (unk_ >= 0) {
      if (is_unknown && !fuse_unk_) add(unk_);
      is_unknown = true;
    }
  }
  if (is_unknown) add(unk_);
  if (!symbols.empty()) symbols.back().next = -1;
}

void Bpe::encode(std::string_view word, std::vector<std::int64_t>& ids) const {
  if (ignore_merges_) {
    if (const auto found = vocabulary_.find(word); found != vocabulary_.end()) return ids.push_back(found->second);
  }
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  split(word, symbols);

  const auto merge_at = [&](std::int32_t position) -> const Merge* {
    const Symbol& left = symbols[position];
    return left.id < 0 || left.next < 0 ? nullptr : find(left.id, symbols[left.next].id);
  };
  std::vector<Candidate> candidates;
  candidates.reserve(symbols.size());
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(symbols.size()); ++i) {
    if (const Merge* merge = merge_at(i)) candidates.push_back(candidate(merge->rank, i));
  }
  std::priority_queue queue(std::greater<Candidate>(), std::move(candidates));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const auto position = static_cast<std::int32_t>(best & UINT32_MAX);
    const Merge* merge = merge_at(position);
    // The pair may have changed since it was queued.
    if (merge == nullptr || candidate(merge->rank, position) != best) continue;
    Symbol& left = symbols[position];
    Symbol& right = symbols[left.next];
    left.id = merge->merged;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = position;
    for (const std::int32_t changed : {left.previous, position}) {
      if (changed < 0) continue;
      if (const Merge* next = merge_at(changed)) queue.push(candidate(next->rank, changed));
    }
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

}  // namespace chameleon
