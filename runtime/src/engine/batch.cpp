#include "engine/batch.h"

#include <algorithm>
#include <numeric>

#include "decode/shared_cache.h"
#include "device/static_batch.h"

namespace chameleon {

namespace {

// Copying the cached tokens of a sibling takes less than an eighth of the time of a prefill.
constexpr std::size_t kForkedPerPrefill = 8;

}  // namespace

std::vector<std::int64_t> Member::draft() {
  // The last new token is never read, so a draft ends before it.
  const std::size_t left = row.capacity() - row.prompt().size() - row.token_ids().size();
  const std::size_t limit = std::min(draft_tokens, left);
  if (limit == 0) return {};
  if (!lookup) lookup.emplace(row.prompt());
  lookup->extend(row.token_ids());
  return lookup->draft(limit);
}

Members members_of(std::vector<Row> rows, const std::shared_ptr<Stream::State>& stream, const Generate& generate,
                   const Tenant& tenant) {
  const Clock::time_point now = Clock::now();
  const auto end = generate.deadline ? now + std::chrono::duration_cast<Clock::duration>(bounded(*generate.deadline))
                                     : Clock::time_point::max();
  const auto draft_tokens = static_cast<std::size_t>(generate.prompt_lookup_num_tokens);
  Members members;
  std::shared_ptr<Prompt> prompt;
  for (Row& row : rows) {
    if (row.index() % generate.n == 0) prompt = std::make_shared<Prompt>(Prompt{row.prompt()});
    members.push_back(std::make_shared<Member>(Member{stream, prompt, std::move(row), now, end, now, draft_tokens,
                                                      generate.cache_salt, generate.cache_generated}));
    members.back()->tenant = tenant;
  }
  return members;
}

RowFactors row_factors(const FactorTable& table, std::span<const std::shared_ptr<Member>> members) {
  RowFactors factors{table.sets(), {}};
  for (const auto& member : members)
    factors.factor_ids.push_back(static_cast<std::int64_t>(table.index(member->key())));
  return factors;
}

ContinuousBatch::ContinuousBatch(std::unique_ptr<Slots> slots, const FactorTable& table, Schedule schedule,
                                 PrefixCache* cache)
    : slots_(std::move(slots)),
      table_(table),
      schedule_(schedule),
      left_to_step_(slots_->is_exact() && !schedule.reads_all ? 1 : 0) {
  if (cache != nullptr) prefixes_.emplace(*cache, *slots_, table_, schedule_.prefill_tokens);
}

std::size_t ContinuousBatch::cached_tokens() const {
  const auto used = slots_->lengths().first(members_.size());
  return static_cast<std::size_t>(std::accumulate(used.begin(), used.end(), std::int64_t{0}));
}

void ContinuousBatch::admit(std::shared_ptr<Member> member) {
  slots_->admit(members_.size());
  member->place = admitted_++;
  members_.push_back(std::move(member));
}

void ContinuousBatch::drop_ended() {
  for (std::size_t place = members_.size(); place-- > 0;) {
    if (!members_[place]->has_ended) continue;
    if (prefixes_) prefixes_->keep(*members_[place], place);
    drop(place);
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

/// The end of the tokens that are read with the same factors as the token `start`.
std::size_t ContinuousBatch::end_of_part(const Member& member, std::size_t start) const {
  return start < member.prompt->start ? member.prompt->start : length_to_prefill(member);
}

std::size_t ContinuousBatch::next_to_prefill() const {
  // GroupQueryAttention appends several tokens to a cache that is not empty for a single row only.
  if (ready_ < members_.size() && slots_->lengths()[ready_] > 0) return 1;
  std::size_t most = schedule_.prefill_tokens;
  if (unread_tenants().size() > 1) most = short_chunk(most);  // nobody waits long for what others read in the same call
  std::vector<std::size_t> lengths;
  std::size_t tokens = 0;
  std::set<Prefixes::Beginning> beginnings;
  for (std::size_t place = ready_; place < members_.size() && tokens <= schedule_.prefill_tokens; ++place) {
    if (sibling(place) || slots_->lengths()[place] > 0) break;  // it is copied later, from a member or the prefix cache
    const bool is_alone = members_[place]->prompt->start > 0;   // it is read in two parts
    if (is_alone && place > ready_) break;
    if (prefixes_) {
      if (place > ready_ && prefixes_->will_have(*members_[place], beginnings)) break;
      beginnings.insert(prefixes_->beginning(*members_[place]));
    }
    lengths.push_back(length_to_prefill(*members_[place]));
    tokens += lengths.back();
    if (is_alone) break;
  }
  return joined(lengths, most);
}

std::size_t ContinuousBatch::prefill(const std::set<std::string>& crowding) {
  std::size_t tokens = prefill_once(crowding);
  while (schedule_.reads_all && ready_ < members_.size()) tokens += prefill_once(crowding);
  return tokens;
}

/// In the order of the batch.
std::vector<std::string> ContinuousBatch::unread_tenants() const {
  std::vector<std::string> names;
  for (std::size_t place = ready_; place < members_.size(); ++place) {
    const std::string& name = members_[place]->tenant.name;
    if (std::ranges::find(names, name) == names.end()) names.push_back(name);
  }
  return names;
}

/// Bring a member of the tenant whose turn it is to the place that is read next.
void ContinuousBatch::bring_next() {
  const std::vector<std::string> names = unread_tenants();
  const auto last_call = [&](const std::string& name) {
    const auto found = read_at_.find(name);
    return found == read_at_.end() ? 0 : found->second;
  };
  const std::string turn = *std::ranges::min_element(names, {}, last_call);
  std::optional<std::size_t> next;
  const auto order = [&](std::size_t place) {  // the one that is begun, so that there is one of each tenant at most
    return std::pair(slots_->lengths()[place] == 0, members_[place]->place);
  };
  for (std::size_t place = ready_; place < members_.size(); ++place) {
    if (members_[place]->tenant.name == turn && (!next || order(place) < order(*next))) next = place;
  }
  if (*next == ready_) return;
  slots_->swap(ready_, *next);
  std::swap(members_[ready_], members_[*next]);
}

std::size_t ContinuousBatch::prefill_once(const std::set<std::string>& crowding) {
  std::size_t forked = 0, tokens = 0;
  while (ready_ < members_.size()) {
    if (tokens == 0) bring_next();
    const auto start = static_cast<std::size_t>(slots_->lengths()[ready_]);
    const std::size_t stop = length_to_prefill(*members_[ready_]);
    const auto read_already = start == 0 ? sibling(ready_) : std::nullopt;
    reading_ = 1;
    if (start == stop) {
      if (prefixes_) prefixes_->keep(*members_[ready_], ready_);
      ++ready_;
    } else if (read_already && forked < schedule_.prefill_tokens * kForkedPerPrefill) {
      slots_->fork(*read_already, ready_, static_cast<std::int64_t>(stop));
      forked += stop;
    } else if (!read_already && start == 0 && prefixes_ && prefixes_->restore(*members_[ready_], ready_)) {
      continue;
    } else if (!read_already && tokens == 0) {
      tokens = prefill_chunks(start, crowding);
    } else {
      break;
    }
  }
  return tokens;
}

/// A member before this one with the same prompt.
std::optional<std::size_t> ContinuousBatch::sibling(std::size_t place) const {
  const auto& prompt = members_[place]->prompt;
  if (prompt.use_count() == 1) return std::nullopt;
  while (place-- > 0) {
    if (members_[place]->prompt == prompt) return place;
  }
  return std::nullopt;
}

std::size_t ContinuousBatch::prefill_chunks(std::size_t start, const std::set<std::string>& crowding) {
  reading_ = next_to_prefill();
  const auto members = std::span(members_).subspan(ready_, reading_);
  std::size_t most = schedule_.prefill_tokens;
  if (crowding.contains(members[0]->tenant.name)) most = short_chunk(most);
  if (prefixes_ && start == 0) {
    for (const auto& member : members) prefixes_->begin(*member, 0, 0);
  }
  std::vector<std::span<const std::int64_t>> chunks;
  std::size_t tokens = 0;
  for (const auto& member : members) {
    const std::size_t length = chunk_length(end_of_part(*member, start) - start, most);
    chunks.push_back(member->prompt->ids.subspan(start, length));
    tokens += length;
  }
  const RowFactors factors =
      members.size() == 1 ? table_.set_of(members[0]->key_at(start)) : row_factors(table_, members);
  const bool wants_logits = start + chunks[0].size() == members[0]->prompt->ids.size();
  const std::vector<float> logits = slots_->prefill(ready_, chunks, factors, wants_logits);
  const std::size_t vocab = logits.size() / members.size();
  for (std::size_t row = 0; wants_logits && row < members.size(); ++row) {
    const auto own = std::span(logits).subspan(row * vocab, vocab);
    members[row]->prompt->logits.assign(own.begin(), own.end());
  }
  Prompt& first = *members[0]->prompt;
  if (members.size() == 1 && start == first.exact && tokens == schedule_.prefill_tokens) first.exact = start + tokens;
  ++calls_;
  std::map<std::string, std::size_t> read_at;
  for (const auto& member : members_) {
    if (const auto found = read_at_.find(member->tenant.name); found != read_at_.end()) read_at.insert(*found);
  }
  for (const auto& member : members) read_at[member->tenant.name] = calls_;
  read_at_ = std::move(read_at);
  return tokens;
}

std::size_t ContinuousBatch::to_step() const {
  if (left_to_step_ == 1) return ready_;
  const auto first = std::ranges::find_if(members_, [](const auto& member) { return member->row.token_ids().empty(); });
  return std::min(ready_, static_cast<std::size_t>(first - members_.begin()));
}

std::vector<std::int64_t> ContinuousBatch::draft() {
  const bool is_worth_it = ready_ == 1 && !members_[0]->row.token_ids().empty();
  return is_worth_it ? members_[0]->draft() : std::vector<std::int64_t>();
}

Logits ContinuousBatch::step(std::span<const std::int64_t> draft) {
  const auto stepped = std::span(members_).first(to_step());
  std::vector<std::int64_t> last;
  for (const auto& member : stepped) last.push_back(member->row.last_token_id());
  if (!draft.empty()) {
    last.insert(last.end(), draft.begin(), draft.end());
    return slots_->draft(0, last, table_.set_of(stepped[0]->key()));
  }
  if (!stepped.empty()) slots_->step(last, row_factors(table_, stepped));
  Logits logits = slots_->logits();
  for (std::size_t place = stepped.size(); place < ready_; ++place) {
    std::ranges::copy(members_[place]->prompt->logits, logits.at(place).begin());
  }
  return logits;
}

void ContinuousBatch::cut() {
  const Row& row = members_[0]->row;
  slots_->cut(0, std::ssize(row.prompt()) + std::ssize(row.token_ids()) - 1);
}

std::unique_ptr<Batch> open_batch(const Decoder& decoder, const FactorTable& table, std::size_t rows,
                                  std::size_t capacity, Schedule schedule, PrefixCache* cache, std::stop_token stop) {
  if (const auto* shared = dynamic_cast<const SharedCacheDecoder*>(&decoder)) {
    return std::make_unique<ContinuousBatch>(shared->slots(rows, capacity, std::move(stop)), table, schedule, cache);
  }
  return std::make_unique<StaticBatch>(dynamic_cast<const StaticDecoder&>(decoder), table, rows);
}

}  // namespace chameleon
