// The generation loop: iterations, each with calls that prefill and a step of all ready rows. Engine drives it in its
// own thread, generate_rows in the caller's.
#pragma once

#include "chameleon/iteration.h"
#include "engine/submission.h"
#include "engine/tenants.h"

namespace chameleon {

/// Rows that wait, are admitted to the batch, and end. For one thread.
class Loop {
 public:
  /// What an iteration gave: tokens in the order of the batch, and its record.
  struct Result {
    std::vector<std::pair<std::shared_ptr<Stream::State>, Token>> tokens;
    Iteration iteration;
  };

  /// batch, table, tokenizer: must outlive this
  /// eos_token_id: ends a row; -1 ends none
  /// errors: `row` ends the rows that an error concerns; `raise` lets the first one out of `iterate`
  Loop(Batch& batch, FactorTable& table, const Tokenizer& tokenizer, std::int64_t eos_token_id,
       OnError errors = OnError::row);

  /// Admit a member, for which the batch and the table have room.
  void admit(std::shared_ptr<Member> member);
  /// Let members wait for a place.
  void wait(const Members& members) { waiting_.insert(waiting_.end(), members.begin(), members.end()); }
  [[nodiscard]] const Members& waiting() const { return waiting_; }
  /// Whether there is nothing to do.
  [[nodiscard]] bool empty() const { return waiting_.empty() && batch_.members().empty(); }

  /// Cancel every row.
  void cancel();
  /// Run one iteration.
  Result iterate();
  /// End every row after `iterate` has thrown.
  Result fail(const Error& error);

 private:
  void end_expired();
  void drop_ended();
  void admit_waiting();
  void prefill();
  void step();
  void accept(Member& member, std::span<const std::int64_t> draft, Logits logits);
  void append(Member& member, std::span<float> logits);
  void end(Member& member, FinishReason reason, std::optional<Error> error = {});
  void end_failed(std::span<const std::shared_ptr<Member>> members, const std::exception& error);
  [[nodiscard]] std::set<std::string> crowding();
  void end_failed(Member& member, const std::exception& error);
  void give_out(Member& member, Token token);

  Batch& batch_;
  FactorTable& table_;
  const Tokenizer& tokenizer_;
  std::int64_t eos_token_id_;
  OnError errors_;
  Members waiting_;  // in order of arrival
  Shares shares_;
  Crowding crowding_;
  std::set<std::string> waiting_names_;  // of tenants, in the current iteration
  Result result_;
};

/// The generations of rows that begin at once, in the caller's thread; their tokens go to the stream's callback, after
/// each step in the order of the rows. Every prompt is read before the first step, in calls as large as pays.
std::vector<Generation> generate_rows(const Runtime::Impl& runtime, const Submission& submission, OnError errors);

}  // namespace chameleon
