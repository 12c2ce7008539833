#include "engine/loop.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "chameleon/error.h"
#include "decode/shared_cache.h"

namespace chameleon {

namespace {

/// What a row that failed tells its caller. A graph that fails is no fault of the request: its caller learns that the
/// call failed.
Error as_error(const std::exception& error) {
  const auto* own = dynamic_cast<const Error*>(&error);
  if (own != nullptr && dynamic_cast<const GraphError*>(own) == nullptr) return *own;
  return RequestError(std::string("the decoder failed in a call that this request was part of: ") + error.what());
}

}  // namespace

Loop::Loop(Batch& batch, FactorTable& table, const Tokenizer& tokenizer, std::int64_t eos_token_id, OnError errors)
    : batch_(batch), table_(table), tokenizer_(tokenizer), eos_token_id_(eos_token_id), errors_(errors) {}

void Loop::cancel() {
  for (const auto& member : waiting_) member->stream->cancelled = true;
  for (const auto& member : batch_.members()) member->stream->cancelled = true;
}

Loop::Result Loop::iterate() {
  end_expired();
  drop_ended();
  admit_waiting();
  if (batch_.ready() < batch_.members().size()) prefill();
  step();
  return std::exchange(result_, {});
}

Loop::Result Loop::fail(const Error& error) {
  for (const Members* members : {&std::as_const(waiting_), &batch_.members()}) {
    for (const auto& member : *members) {
      if (!member->has_ended) end(*member, FinishReason::error, error);
    }
  }
  return std::exchange(result_, {});
}

/// End the rows that were cancelled or are past their deadline.
void Loop::end_expired() {
  const Clock::time_point now = Clock::now();
  for (const Members* members : {&std::as_const(waiting_), &batch_.members()}) {
    for (const auto& member : *members) {
      if (member->has_ended) continue;
      if (member->is_cancelled()) {
        end(*member, FinishReason::cancelled);
      } else if (now >= member->deadline) {
        end(*member, FinishReason::deadline);
      }
    }
  }
  std::erase_if(waiting_, [](const auto& member) { return member->has_ended; });
}

void Loop::drop_ended() {
  Members ended;
  std::ranges::copy_if(batch_.members(), std::back_inserter(ended),
                       [](const auto& member) { return member->has_ended; });
  batch_.drop_ended();  // which asks the table for their sets
  for (const auto& member : ended) table_.release(member->key());
}

void Loop::admit_waiting() {
  waiting_names_.clear();
  if (waiting_.empty()) return;
  std::map<std::string, std::size_t> rows;  // by tenant
  std::vector<std::string> names;
  const auto note = [&](const Member& member) {
    if (std::ranges::find(names, member.tenant.name) == names.end()) names.push_back(member.tenant.name);
  };
  for (const auto& member : batch_.members()) {
    ++rows[member->tenant.name];
    note(*member);
  }
  for (const auto& member : waiting_) {
    note(*member);
    waiting_names_.insert(member->tenant.name);
  }
  shares_.keep(names);
  const std::size_t places = batch_.room() + batch_.members().size();
  const auto next_line = [&](const std::vector<std::deque<std::shared_ptr<Member>>>& lines) {
    std::vector<const Tenant*> tenants, within;
    std::vector<std::size_t> of;
    for (std::size_t line = 0; line < lines.size(); ++line) {
      const Tenant& tenant = lines[line].front()->tenant;
      if (tenant.rows && rows[tenant.name] >= *tenant.rows) continue;
      within.push_back(&tenant);
      if (!may_begin(tenant, rows[tenant.name], batch_.room(), places)) continue;
      tenants.push_back(&tenant);
      of.push_back(line);
    }
    return tenants.empty() ? std::nullopt : std::optional(of[shares_.turn(tenants, within)]);
  };
  std::map<const Stream::State*, std::size_t> running;
  for (const auto& member : batch_.members()) ++running[member->stream.get()];
  const auto is_resident = [&](const Member& member) { return table_.contains(member.key()); };
  Admissible in_turn(waiting_, std::move(running));
  std::set<std::shared_ptr<Member>> taken;
  while (batch_.room() > 0) {
    auto member = in_turn.next(is_resident, table_.is_full(), next_line);
    if (member == nullptr) break;
    taken.insert(member);
    ++rows[member->tenant.name];
    shares_.charge(member->tenant, member->prompt->ids.size(), waiting_names_);
    try {
      admit(member);
    } catch (const std::exception& error) {  // also errors of the hypernetwork's session
      end_failed(*member, error);
    }
  }
  std::erase_if(waiting_, [&](const auto& member) { return taken.contains(member); });
}

void Loop::admit(std::shared_ptr<Member> member) {
  const bool hit = table_.contains(member->key());
  table_.acquire(member->source);
  result_.iteration.factor_set_hits += hit ? 1 : 0;
  member->queued = Clock::now() - member->submitted;
  result_.iteration.queued.push_back(*member->queued);
  batch_.admit(std::move(member));
}

void Loop::prefill() {
  const Clock::time_point started = Clock::now();
  try {
    result_.iteration.prefilled_tokens = batch_.prefill(crowding());
  } catch (const std::exception& error) {
    end_failed(std::span(batch_.members()).subspan(batch_.ready(), batch_.to_prefill()), error);
  }
  result_.iteration.chunk = Clock::now() - started;
}

/// The tenants that read short chunks now, see tenants.h.
std::set<std::string> Loop::crowding() {
  std::vector<const Tenant*> present, unread;
  for (const auto& member : waiting_) {
    present.push_back(&member->tenant);
    unread.push_back(&member->tenant);
  }
  for (std::size_t place = 0; place < batch_.members().size(); ++place) {
    present.push_back(&batch_.members()[place]->tenant);
    if (place >= batch_.ready()) unread.push_back(present.back());
  }
  return crowding_.names(present, unread);
}

void Loop::step() {
  const auto ready = std::span(batch_.members()).first(batch_.ready());
  if (ready.empty()) return;
  result_.iteration.rows = ready.size();
  result_.iteration.factor_sets = table_.size();
  const Clock::time_point started = Clock::now();
  const std::vector<std::int64_t> draft = batch_.draft();
  std::optional<Logits> logits;
  try {
    logits = batch_.step(draft);
  } catch (const std::exception& error) {
    return end_failed(ready.first(batch_.to_step()), error);
  }
  result_.iteration.step = Clock::now() - started;
  if (!draft.empty()) return accept(*ready[0], draft, *logits);
  for (std::size_t place = 0; place < ready.size(); ++place) append(*ready[place], logits->at(place));
}

/// Append tokens to the only row until one differs from its draft.
void Loop::accept(Member& member, std::span<const std::int64_t> draft, Logits logits) {
  for (std::size_t i = 0; i <= draft.size(); ++i) {
    append(member, logits.at(0, i));
    if (member.has_ended || (i < draft.size() && member.row.last_token_id() != draft[i])) break;
  }
  batch_.cut();
}

void Loop::append(Member& member, std::span<float> logits) {
  Token token;
  try {
    token = member.row.append(member.row.choose(logits), tokenizer_, eos_token_id_);
  } catch (const std::exception& error) {
    return end_failed(member, error);
  }
  shares_.charge(member.tenant, 1, waiting_names_);
  const Clock::time_point now = Clock::now();
  if (!member.first_token) {
    member.first_token = now - member.submitted;
    result_.iteration.first_tokens.push_back(*member.first_token);
  } else {
    result_.iteration.later_tokens.push_back(now - member.last_token);
  }
  member.last_token = now;
  give_out(member, std::move(token));
}

void Loop::end(Member& member, FinishReason reason, std::optional<Error> error) {
  give_out(member, member.row.end(reason, std::move(error)));
}

/// In a handler of the error: end the rows that it concerns, or let it out. A cancelled row ends as such, since
/// cancelling may end a call too.
void Loop::end_failed(std::span<const std::shared_ptr<Member>> members, const std::exception& error) {
  for (const auto& member : members) end_failed(*member, error);
}

void Loop::end_failed(Member& member, const std::exception& error) {
  if (member.is_cancelled()) return end(member, FinishReason::cancelled);
  if (errors_ == OnError::raise) throw;
  end(member, FinishReason::error, as_error(error));
}

/// Give out a token, which may be the row's last.
void Loop::give_out(Member& member, Token token) {
  if (token.generation != nullptr) {
    member.has_ended = true;
    const Row& row = member.row;
    result_.iteration.finished.push_back({member.stream->mode, row.cluster_id(), token.generation->finish_reason,
                                          row.prompt().size(), row.token_ids().size(), Clock::now() - member.submitted,
                                          member.queued, member.first_token, member.source.adapters,
                                          member.tenant.name});
  }
  result_.tokens.emplace_back(member.stream, std::move(token));
}

std::vector<Generation> generate_rows(const Runtime::Impl& runtime, const Submission& submission, OnError errors) {
  const Members& members = submission.members;
  const Decoder& decoder = *runtime.backend.decoder;
  Stream::State& stream = *submission.stream;
  const std::vector<std::span<const std::int64_t>> prompts(stream.prompts.begin(), stream.prompts.end());
  const RowSources sources = runtime.sources.of_rows(submission.adapt, prompts, submission.embedded);
  FactorTable table(sources.make_all());
  std::size_t capacity = 0;
  for (const auto& member : members) {
    const std::size_t prompt = member->row.index() / stream.n;
    member->source.key = std::to_string(sources.factor_ids[prompt]);
    if (!sources.starts.empty()) member->prompt->start = static_cast<std::size_t>(sources.starts[prompt]);
    capacity = std::max(capacity, member->row.capacity());
  }
  const auto* shared = dynamic_cast<const SharedCacheDecoder*>(&decoder);
  const Schedule schedule{shared != nullptr ? shared->prefill_tokens() : 0, true};
  const auto batch = open_batch(decoder, table, members.size(), capacity, schedule, nullptr, stream.stop);
  Loop loop(*batch, table, runtime.tokenizer, runtime.bundle.manifest.model.eos_token_id, errors);
  for (const auto& member : members) loop.admit(member);
  std::vector<Generation> generations(members.size());
  while (!loop.empty()) {
    Loop::Result result = loop.iterate();
    std::ranges::stable_sort(result.tokens, {}, [](const auto& given) { return given.second.row; });
    for (const auto& [own, token] : result.tokens) {
      stream.call_back(token);
      if (token.generation != nullptr) generations[token.row] = *token.generation;
    }
  }
  return generations;
}

}  // namespace chameleon
