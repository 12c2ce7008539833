#include "engine/prefixes.h"

#include <algorithm>
#include <limits>

#include "decode/schedule.h"
#include "engine/batch.h"

namespace chameleon {

namespace {

constexpr std::size_t kBlockTokens = PrefixCache::kBlockTokens;

}  // namespace

Prefixes::Prefixes(PrefixCache& cache, Slots& slots, const FactorTable& table, std::size_t prefill_tokens)
    : cache_(cache), slots_(slots), table_(table), prefill_tokens_(prefill_tokens), left_(slots.is_exact() ? 1 : 2) {}

bool Prefixes::restore(const Member& member, std::size_t place) {
  const std::vector<PrefixCache::Found> blocks = find(member, true);
  if (blocks.empty()) return false;
  for (const auto& block : blocks) slots_.copy_in(place, block.memory, kBlockTokens);
  const std::size_t length = blocks.size() * kBlockTokens;
  const bool is_exact =
      length % prefill_tokens_ == 0 && std::ranges::all_of(blocks, [](const auto& block) { return block.is_exact; });
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
  for (const Part& part : parts(member)) {
    if (part.first >= length) break;
    const std::size_t exact = member.prompt->exact - std::min(member.prompt->exact, part.first);
    cache_.offer(
        part.root, std::span(text).subspan(part.first, std::min(part.end, length) - part.first), exact,
        [&](std::size_t start, std::byte* block) { slots_.copy_out(place, part.first + start, block, kBlockTokens); });
  }
}

Prefixes::Beginning Prefixes::beginning(const Member& member) const {
  const auto ids = member.prompt->ids;
  const auto first = ids.first(std::min(ids.size(), kCallTokens));
  const std::vector<Part> all = parts(member);
  const Part& part = all.back().first < kCallTokens ? all.back() : all.front();
  return {part.root->digest, std::vector(first.begin(), first.end())};
}

bool Prefixes::will_have(const Member& member, const std::set<Beginning>& beginnings) const {
  return !find(member, false).empty() ||
         (member.cache_generated && member.prompt->ids.size() > kCallTokens && beginnings.contains(beginning(member)));
}

/// Where an update begins later, the whole blocks before it are the base model's, for every adapter. What comes then
/// depends on them and on where the update begins, too.
std::vector<Prefixes::Part> Prefixes::parts(const Member& member) const {
  const std::string &salt = member.cache_salt, &digest = table_.trunk_digest(member.key());
  const std::size_t start = member.prompt->start, first = start / kBlockTokens * kBlockTokens;
  constexpr std::size_t kEnd = std::numeric_limits<std::size_t>::max();
  if (start == 0) return {{cache_.root(digest, salt), 0, kEnd}};
  return {{cache_.root(table_.trunk_digest(kNoUpdate), salt), 0, first},
          {cache_.root(digest, salt, start, member.prompt->ids.first(first)), first, kEnd}};
}

/// The blocks that a member's prompt is to begin with.
std::vector<PrefixCache::Found> Prefixes::find(const Member& member, bool is_used) const {
  const auto ids = member.prompt->ids;
  if (ids.size() <= left_) return {};
  std::vector<PrefixCache::Found> blocks;
  const auto text = ids.first(ids.size() - left_);
  for (const Part& part : parts(member)) {
    if (blocks.size() * kBlockTokens != part.first || part.first > text.size()) break;
    const auto own = text.subspan(part.first, std::min(part.end, text.size()) - part.first);
    const std::vector<PrefixCache::Found> found = cache_.find(*part.root, own, is_used);
    blocks.insert(blocks.end(), found.begin(), found.end());
  }
  if (!member.cache_generated) {
    const auto first = std::ranges::find(blocks, false, &PrefixCache::Found::is_exact);
    const std::size_t exact = static_cast<std::size_t>(first - blocks.begin()) * kBlockTokens;
    // Up to where a run that finds nothing ends a chunk, too: before two tokens it cuts otherwise.
    const std::size_t read = left_ == 1 ? ids.size() - 1 : ids.size();
    std::size_t most = 0;
    for (std::size_t end = prefill_tokens_; end <= exact; end += prefill_tokens_) {
      const std::size_t end_of_part = end < member.prompt->start ? member.prompt->start : read;
      if (end % kBlockTokens == 0 && end_of_part - end != 1) most = end;
    }
    blocks.resize(most / kBlockTokens);
  }
  // Less saves no more than a call costs, and short prompts can be read together.
  if (blocks.size() * kBlockTokens < kCallTokens) blocks.clear();
  return blocks;
}

}  // namespace chameleon
