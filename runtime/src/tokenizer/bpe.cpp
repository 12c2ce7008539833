#include "tokenizer/bpe.h"

#include <queue>
#include <tuple>

namespace chameleon {

namespace {

std::uint64_t key(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
}

/// A token of the word so far, in a doubly linked list; id is -1 once it has become part of its left neighbour.
struct Symbol {
  std::int32_t id;
  std::int32_t previous;
  std::int32_t next;
};

struct Candidate {
  std::int32_t rank;
  std::int32_t position;
  std::int32_t merged;
  bool operator<(const Candidate& other) const {  // std::priority_queue gives the greatest first
    return std::tie(rank, position) > std::tie(other.rank, other.position);
  }
};

}  // namespace

Bpe::Bpe(const std::array<std::int32_t, 256>& byte_ids, const std::vector<Merge>& merges) : byte_ids_(byte_ids) {
  merges_.reserve(merges.size());
  std::int32_t rank = 0;
  for (const auto& [left, right, merged] : merges) {
    merges_.insert_or_assign(key(left, right), Target{rank++, merged});
  }
}

const Bpe::Target* Bpe::find(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view word, std::vector<std::int64_t>& ids) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (const char c : word) {
    const std::int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id < 0) continue;
    const auto here = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, here - 1, here + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate> queue;
  const auto consider = [&](std::int32_t position) {
    if (position < 0 || symbols[position].next < 0) return;
    const Target* target = find(symbols[position].id, symbols[symbols[position].next].id);
    if (target != nullptr) queue.push({target->rank, position, target->id});
  };
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.position];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // The pair may have changed since it was queued.
    const Target* target = find(left.id, right.id);
    if (target == nullptr || target->rank != best.rank) continue;
    left.id = best.merged;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = best.position;
    consider(left.previous);
    consider(best.position);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

}  // namespace chameleon
