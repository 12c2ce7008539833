#include "device/static_batch.h"

#include <algorithm>

#include "factors.h"

namespace chameleon {

StaticBatch::StaticBatch(const StaticDecoder& decoder, const FactorTable& table, std::size_t rows)
    : decoder_(decoder), table_(table), rows_(rows) {}

std::size_t StaticBatch::cached_tokens() const {
  std::size_t tokens = 0;
  for (const auto& member : members_) {
    if (cache_ == nullptr) return 0;
    tokens += member->row.prompt().size() + std::max<std::size_t>(member->row.token_ids().size(), 1) - 1;
  }
  return tokens;
}

void StaticBatch::drop_ended() {
  std::vector<std::size_t> kept;
  Members staying;
  for (std::size_t place = 0; place < members_.size(); ++place) {
    if (members_[place]->has_ended) continue;
    kept.push_back(place);
    staying.push_back(members_[place]);
  }
  if (kept.size() == members_.size()) return;
  members_ = std::move(staying);
  if (members_.empty()) {
    cache_.reset();
  } else if (cache_ != nullptr) {
    decoder_.select(*cache_, kept);
    factors_ = factors_.rows(kept);
  }
}

Logits StaticBatch::step(std::span<const std::int64_t> /*draft*/) {
  if (cache_ != nullptr) {
    std::vector<std::int64_t> last;
    for (const auto& member : members_) last.push_back(member->row.last_token_id());
    return decoder_.step(last, factors_, *cache_);
  }
  factors_ = row_factors(table_, members_);
  factors_.sets = copied(factors_.sets);  // since the table changes when the first member leaves
  std::vector<std::span<const std::int64_t>> prompts;
  std::size_t capacity = 0;
  for (const auto& member : members_) {
    prompts.push_back(member->row.prompt());
    capacity = std::max(capacity, member->row.capacity());
  }
  auto [logits, cache] = decoder_.prefill(prompts, factors_, capacity);
  cache_ = std::move(cache);
  return logits;
}

}  // namespace chameleon
