// The work of the engine's thread: iterations, each with a prefill chunk and a step of all ready rows.
#pragma once

#include "chameleon/iteration.h"
#include "engine/batch.h"

namespace chameleon {

/// Rows that wait, are admitted to the batch, and end. For one thread.
class Loop {
 public:
  /// What an iteration gave: tokens in the order of the rows' streams, and its record.
  struct Result {
    std::vector<std::pair<std::shared_ptr<Stream::State>, Token>> tokens;
    Iteration iteration;
  };

  /// batch, table, tokenizer: must outlive this
  Loop(Batch& batch, FactorTable& table, const Tokenizer& tokenizer, std::int64_t eos_token_id);

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
  void admit();
  void prefill();
  void step();
  void end(Member& member, FinishReason reason, std::optional<Error> error = {});
  void append(Member& member, Choice choice);
  void give_out(Member& member, Token token);

  Batch& batch_;
  FactorTable& table_;
  const Tokenizer& tokenizer_;
  std::int64_t eos_token_id_;
  Members waiting_;  // in order of arrival
  Result result_;
};

}  // namespace chameleon
