#include "engine/loop.h"

#include <map>
#include <utility>

#include "chameleon/error.h"
#include "decode/schedule.h"

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

Loop::Loop(Batch& batch, FactorTable& table, const Tokenizer& tokenizer, std::int64_t eos_token_id)
    : batch_(batch), table_(table), tokenizer_(tokenizer), eos_token_id_(eos_token_id) {}

void Loop::cancel() {
  for (const auto& member : waiting_) member->stream->cancelled = true;
  for (const auto& member : batch_.members()) member->stream->cancelled = true;
}

Loop::Result Loop::iterate() {
  end_expired();
  drop_ended();
  admit();
  prefill();
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
      if (member->stream->is_cancelled(member->row.index())) {
        end(*member, FinishReason::cancelled);
      } else if (now >= member->deadline) {
        end(*member, FinishReason::deadline);
      }
    }
  }
  std::erase_if(waiting_, [](const auto& member) { return member->has_ended; });
}

void Loop::drop_ended() {
  for (const auto& member : batch_.members()) {
    if (member->has_ended) table_.release(member->key());
  }
  batch_.drop_ended();
}

void Loop::admit() {
  std::map<const Stream::State*, std::size_t> of_request;
  for (const auto& member : batch_.members()) ++of_request[member->stream.get()];
  const auto running = [&](const Member& member) { return of_request[member.stream.get()]; };
  const auto is_resident = [&](const Member& member) { return table_.contains(member.key()); };
  while (batch_.room() > 0) {
    auto member = take_next(waiting_, running, is_resident, table_.is_full());
    if (member == nullptr) return;
    const bool hit = is_resident(*member);
    try {
      table_.acquire(member->source);
    } catch (const std::exception& error) {  // also errors of the hypernetwork's session
      end(*member, FinishReason::error, as_error(error));
      continue;
    }
    result_.iteration.factor_set_hits += hit ? 1 : 0;
    result_.iteration.queued.push_back(Clock::now() - member->submitted);
    ++of_request[member->stream.get()];
    batch_.admit(std::move(member));
  }
}

void Loop::prefill() {
  const Clock::time_point started = Clock::now();
  try {
    result_.iteration.chunk_tokens = batch_.prefill();
  } catch (const std::exception& error) {
    for (const auto& member : std::span(batch_.members()).subspan(batch_.ready(), batch_.to_prefill())) {
      end(*member, FinishReason::error, as_error(error));
    }
  }
  result_.iteration.chunk = Clock::now() - started;
}

void Loop::step() {
  const auto ready = std::span(batch_.members()).first(batch_.ready());
  if (ready.empty()) return;
  result_.iteration.rows = ready.size();
  result_.iteration.factor_sets = table_.size();
  const Clock::time_point started = Clock::now();
  try {
    batch_.step();
  } catch (const std::exception& error) {
    for (const auto& member : ready.first(batch_.to_step())) end(*member, FinishReason::error, as_error(error));
    return;
  }
  result_.iteration.step = Clock::now() - started;
  for (std::size_t place = 0; place < ready.size(); ++place) {
    Member& member = *ready[place];
    try {
      append(member, member.row.sampler().choose(batch_.logits(place)));
    } catch (const std::exception& error) {
      end(member, FinishReason::error, as_error(error));
    }
  }
}

void Loop::append(Member& member, Choice choice) {
  Token token = member.row.append(std::move(choice), tokenizer_, eos_token_id_);
  const Clock::time_point now = Clock::now();
  Iteration& iteration = result_.iteration;
  auto& times = member.row.token_ids().size() == 1 ? iteration.first_tokens : iteration.later_tokens;
  times.push_back(now - member.last_token);
  member.last_token = now;
  give_out(member, std::move(token));
}

void Loop::end(Member& member, FinishReason reason, std::optional<Error> error) {
  give_out(member, member.row.end(reason, std::move(error)));
}

/// Give out a token, which may be the row's last.
void Loop::give_out(Member& member, Token token) {
  if (token.generation != nullptr) {
    member.has_ended = true;
    const Row& row = member.row;
    result_.iteration.finished.push_back({member.stream->mode, row.cluster_id(), token.generation->finish_reason,
                                          row.prompt().size(), row.token_ids().size(),
                                          Clock::now() - member.submitted});
  }
  result_.tokens.emplace_back(member.stream, std::move(token));
}

}  // namespace chameleon
