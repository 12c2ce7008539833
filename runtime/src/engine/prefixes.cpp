#include "engine/prefixes.h"

#include <algorithm>

#include "decode/schedule.h"
#include "engine/batch.h"

namespace chameleon {

namespace {

constexpr std::size_t kBlockTokens = PrefixCache::kBlockTokens;

}  // namespace

Prefixes::Prefixes(PrefixCache& cache, Slots& slots, const FactorTable& table, std::size_t chunk_tokens)
    : cache_(cache), slots_(slots), table_(table), chunk_tokens_(chunk_tokens), left_(slots.is_exact() ? 1 : 2) {}

bool Prefixes::restore(const Member& member, std::size_t place) {
  const std::vector<PrefixCache::Found> blocks = find(member, true);
  if (blocks.empty()) return false;
  for (const auto& block : blocks) slots_.copy_in(place, block.memory, kBlockTokens);
  const std::size_t length = blocks.size() * kBlockTokens;
  const bool is_exact =
      length % chunk_tokens_ == 0 && std::ranges::all_of(blocks, [](const auto& block) { return block.is_exact; });
  begin(member, length, is_exact ? length : 0);
  return true;
}

void Prefixes::begin(const Member& member, std::size_t cached, std::size_t exact) {
  Prompt& prompt = *member.prompt;
  prompt.exact = exact;
  if (prompt.begun) return;  // a later continuation may find what the first has left
  prompt.begun = true;
  cache_.count(prompt.ids.size(), cached);
  member.stream->set_cached_tokens(member.row.index() / member.stream->n, cached);
}

void Prefixes::keep(const Member& member, std::size_t place) {
  const auto ids = member.prompt->ids;
  auto length = static_cast<std::size_t>(slots_.lengths()[place]);
  if (length == 0) return;
  if (!member.cache_generated) length = std::min(length, ids.size() - 1);  // the last token may be read by a step
  std::vector text(ids.begin(), ids.end());
  text.insert(text.end(), member.row.token_ids().begin(), member.row.token_ids().end());
  cache_.offer(root(member), std::span(text).first(length), member.prompt->exact,
               [&](std::size_t start, std::byte* block) { slots_.copy_out(place, start, block, kBlockTokens); });
}

Prefixes::Beginning Prefixes::beginning(const Member& member) const {
  const auto ids = member.prompt->ids;
  const auto first = ids.first(std::min(ids.size(), kCallTokens));
  return {root(member)->digest, std::vector(first.begin(), first.end())};
}

bool Prefixes::will_have(const Member& member, const std::set<Beginning>& beginnings) const {
  return !find(member, false).empty() ||
         (member.cache_generated && member.prompt->ids.size() > kCallTokens && beginnings.contains(beginning(member)));
}

std::shared_ptr<PrefixCache::Root> Prefixes::root(const Member& member) const {
  return cache_.root(table_.trunk_digest(member.key()), member.cache_salt);
}

/// The blocks that a member's prompt is to begin with.
std::vector<PrefixCache::Found> Prefixes::find(const Member& member, bool is_used) const {
  const auto ids = member.prompt->ids;
  if (ids.size() <= left_) return {};
  std::vector<PrefixCache::Found> blocks = cache_.find(*root(member), ids.first(ids.size() - left_), is_used);
  if (!member.cache_generated) {
    const auto first = std::ranges::find(blocks, false, &PrefixCache::Found::is_exact);
    const std::size_t exact = static_cast<std::size_t>(first - blocks.begin()) * kBlockTokens;
    // Up to where a run that finds nothing ends a chunk, too: before two tokens it cuts otherwise.
    const std::size_t read = left_ == 1 ? ids.size() - 1 : ids.size();
    std::size_t most = 0;
    for (std::size_t end = chunk_tokens_; end <= exact; end += chunk_tokens_) {
      if (end % kBlockTokens == 0 && read - end != 1) most = end;
    }
    blocks.resize(most / kBlockTokens);
  }
  // Less saves no more than a call costs, and short prompts can be read together.
  if (blocks.size() * kBlockTokens < kCallTokens) blocks.clear();
  return blocks;
}

}  // namespace chameleon
