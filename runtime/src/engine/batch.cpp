#include "engine/batch.h"

#include <algorithm>
#include <numeric>

#include "decode/schedule.h"
#include "factors.h"

namespace chameleon {

namespace {

// Copying the cached tokens of a sibling takes less than an eighth of the time of a prefill.
constexpr std::size_t kForkedPerPrefill = 8;

/// The factors of some members, in the table's stack.
RowFactors row_factors(const FactorTable& table, std::span<const std::shared_ptr<Member>> members) {
  RowFactors factors{table.sets(), {}};
  for (const auto& member : members)
    factors.factor_ids.push_back(static_cast<std::int64_t>(table.index(member->key())));
  return factors;
}

std::size_t cached_tokens_of(const Member& member) {
  return member.row.prompt().size() + member.row.token_ids().size() - (member.row.token_ids().empty() ? 0 : 1);
}

}  // namespace

ContinuousBatch::ContinuousBatch(std::unique_ptr<Slots> slots, const FactorTable& table, std::size_t chunk_tokens)
    : slots_(std::move(slots)), table_(table), chunk_tokens_(chunk_tokens), left_to_step_(slots_->is_exact() ? 1 : 0) {}

std::size_t ContinuousBatch::cached_tokens() const {
  const auto used = slots_->lengths().first(members_.size());
  return static_cast<std::size_t>(std::accumulate(used.begin(), used.end(), std::int64_t{0}));
}

void ContinuousBatch::admit(std::shared_ptr<Member> member) {
  slots_->admit(members_.size());
  members_.push_back(std::move(member));
}

void ContinuousBatch::drop_ended() {
  for (std::size_t place = members_.size(); place-- > 0;) {
    if (members_[place]->has_ended) drop(place);
  }
}

void ContinuousBatch::drop(std::size_t place) {
  if (place < ready_) {  // the last ready member moves into the gap and leaves one itself
    --ready_;
    move(ready_, place);
    place = ready_;
  }
  for (std::size_t follower = place + 1; follower < members_.size(); ++follower) {
    move(follower, follower - 1);  // in order; all but the first have no prefilled token yet
  }
  members_.pop_back();
}

void ContinuousBatch::move(std::size_t source, std::size_t target) {
  if (source == target) return;
  slots_->move(source, target);
  members_[target] = members_[source];
}

/// The last token of a prompt may be left to the step.
std::size_t ContinuousBatch::length_to_prefill(const Member& member) const {
  return member.prompt->ids.size() - left_to_step_;
}

std::size_t ContinuousBatch::to_prefill() const {
  // GroupQueryAttention appends several tokens to a cache that is not empty for a single row only.
  if (ready_ < members_.size() && slots_->lengths()[ready_] > 0) return 1;
  std::vector<std::size_t> lengths;
  for (std::size_t place = ready_; place < members_.size() && !sibling(place); ++place) {
    lengths.push_back(length_to_prefill(*members_[place]));
  }
  return joined(lengths, chunk_tokens_);
}

std::size_t ContinuousBatch::prefill() {
  std::size_t forked = 0, tokens = 0;
  while (ready_ < members_.size()) {
    const auto start = static_cast<std::size_t>(slots_->lengths()[ready_]);
    const std::size_t stop = length_to_prefill(*members_[ready_]);
    const auto read_already = start == 0 ? sibling(ready_) : std::nullopt;
    if (start == stop) {
      ++ready_;
    } else if (read_already && forked < chunk_tokens_ * kForkedPerPrefill) {
      slots_->fork(*read_already, ready_, static_cast<std::int64_t>(stop));
      forked += stop;
    } else if (!read_already && tokens == 0) {
      tokens = prefill_chunks(start);
    } else {
      break;
    }
  }
  return tokens;
}

/// A member before this one with the same prompt.
std::optional<std::size_t> ContinuousBatch::sibling(std::size_t place) const {
  for (std::size_t other = 0; other < place; ++other) {
    if (members_[other]->prompt == members_[place]->prompt) return other;
  }
  return std::nullopt;
}

std::size_t ContinuousBatch::prefill_chunks(std::size_t start) {
  const auto members = std::span(members_).subspan(ready_, to_prefill());
  std::vector<std::span<const std::int64_t>> chunks;
  std::size_t tokens = 0;
  for (const auto& member : members) {
    const std::size_t length = chunk_length(length_to_prefill(*member) - start, chunk_tokens_);
    chunks.push_back(member->prompt->ids.subspan(start, length));
    tokens += length;
  }
  const RowFactors factors = members.size() == 1 ? table_.set_of(members[0]->key()) : row_factors(table_, members);
  const bool wants_logits = start + chunks[0].size() == members[0]->prompt->ids.size();
  const std::vector<float> logits = slots_->prefill(ready_, chunks, factors, wants_logits);
  const std::size_t vocab = logits.size() / members.size();
  for (std::size_t row = 0; wants_logits && row < members.size(); ++row) {
    const auto own = std::span(logits).subspan(row * vocab, vocab);
    members[row]->prompt->logits.assign(own.begin(), own.end());
  }
  return tokens;
}

std::size_t ContinuousBatch::to_step() const {
  if (left_to_step_ == 1) return ready_;
  const auto first = std::ranges::find_if(members_, [](const auto& member) { return member->row.token_ids().empty(); });
  return std::min(ready_, static_cast<std::size_t>(first - members_.begin()));
}

void ContinuousBatch::step() {
  const auto stepped = std::span(members_).first(to_step());
  if (!stepped.empty()) {
    std::vector<std::int64_t> last;
    for (const auto& member : stepped) last.push_back(member->row.last_token_id());
    slots_->step(last, row_factors(table_, stepped));
  }
  for (std::size_t place = stepped.size(); place < ready_; ++place) {
    std::ranges::copy(members_[place]->prompt->logits, slots_->logits(place).begin());
  }
}

StaticBatch::StaticBatch(const Decoder& decoder, const FactorTable& table, std::size_t rows)
    : decoder_(decoder), table_(table), rows_(rows) {}

std::size_t StaticBatch::cached_tokens() const {
  if (cache_ == nullptr) return 0;
  return std::transform_reduce(members_.begin(), members_.end(), std::size_t{0}, std::plus<>(),
                               [](const auto& member) { return cached_tokens_of(*member); });
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
    logits_.reset();
  } else if (cache_ != nullptr) {
    decoder_.select(*cache_, kept);
    factors_ = factors_.rows(kept);
  }
}

void StaticBatch::step() {
  if (cache_ != nullptr) {
    std::vector<std::int64_t> last;
    for (const auto& member : members_) last.push_back(member->row.last_token_id());
    logits_ = decoder_.step(last, factors_, *cache_, {});
    return;
  }
  factors_ = row_factors(table_, members_);
  factors_.sets = copied(factors_.sets);  // since the table changes when the first member leaves
  std::vector<std::span<const std::int64_t>> prompts;
  std::size_t capacity = 0;
  for (const auto& member : members_) {
    prompts.push_back(member->row.prompt());
    capacity = std::max(capacity, member->row.capacity());
  }
  auto [logits, cache] = decoder_.prefill(prompts, factors_, capacity, {});
  logits_ = std::move(logits);
  cache_ = std::move(cache);
}

std::unique_ptr<Batch> open_batch(const Decoder& decoder, const FactorTable& table, std::size_t rows,
                                  std::size_t capacity, std::size_t chunk_tokens) {
  if (auto slots = decoder.slots(rows, capacity)) {
    return std::make_unique<ContinuousBatch>(std::move(slots), table, chunk_tokens);
  }
  return std::make_unique<StaticBatch>(decoder, table, rows);
}

}  // namespace chameleon
