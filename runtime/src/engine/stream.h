// The tokens of one submit, passed from the engine's thread to a reading thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stop_token>

#include "chameleon/runtime.h"
#include "chameleon/stream.h"

namespace chameleon {

/// A time to wait that the clock can hold: at least 0, and no more than some decades.
inline Seconds bounded(Seconds time) { return time > Seconds::zero() ? std::min(time, Seconds{1e9}) : Seconds::zero(); }

struct Stream::State {
  /// callback: gets the tokens in place of Stream::next
  /// stopping: ends every row, as `cancelled` does
  State(std::vector<TokenIds> prompt_ids, std::vector<std::int64_t> clusters, Mode used, std::size_t continuations,
        OnToken callback = {}, std::stop_token stopping = {});

  const std::vector<TokenIds> prompts;
  const std::vector<std::int64_t> cluster_ids;
  const Mode mode;
  const std::size_t n;
  const std::stop_token stop;
  std::atomic<bool> cancelled = false;

  void set_cohort(Cohort joined);
  void set_cached_tokens(std::size_t prompt, std::size_t tokens);

  // For the thread that generates.

  /// Whether a row is to end: all rows of this stream were cancelled, or the callback does not want more of this one.
  [[nodiscard]] bool is_cancelled(std::size_t row) const {
    return cancelled || stop.stop_requested() || unwanted_[row];
  }
  /// Call the callback, whose exceptions pass.
  void call_back(const Token& token);
  /// Hand a token to the callback or the reader. An exception of the callback cancels the row.
  void deliver(const Token& token);

 private:
  friend Stream;

  OnToken on_token_;
  std::vector<bool> unwanted_;  // rows, by the callback

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::optional<Cohort> cohort_;
  std::vector<std::size_t> cached_tokens_;  // by prompt
  std::deque<Token> tokens_;
  std::vector<std::shared_ptr<const Generation>> generations_;  // by row
  std::size_t running_;                                         // rows that have not ended
};

}  // namespace chameleon
