#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "chameleon/export.h"
#include "chameleon/generation.h"
#include "chameleon/iteration.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// The prompts whose embeddings are averaged, in the modes cohort and tenant.
struct Cohort {
  std::int64_t id;   ///< counts the cohorts of an engine
  std::size_t size;  ///< number of its prompts, over all clusters
  bool operator==(const Cohort&) const = default;
};

/// The tokens of one Engine::submit. Row i * n + k is continuation k of prompt i. A copy is the same stream; one thread
/// at a time reads it. The engine never waits for a reader, and does not stop when nobody reads: see `cancel`.
///
/// The last Token of every row has its Generation. If that Token has token_id -1, the row ended without a new token.
class CHAMELEON_EXPORT Stream {
 public:
  /// The next token, for which it waits; none after the last token of the last row. With a callback that gets
  /// the tokens this returns none at the end.
  [[nodiscard]] std::optional<Token> next() const;
  /// Wait until `next` returns at once. False after `timeout`.
  [[nodiscard]] bool wait(Seconds timeout) const;
  /// Wait until every row has ended, and return their generations. A row that failed has finish_reason error, and its
  /// Generation the error.
  [[nodiscard]] std::vector<Generation> result() const;
  /// Whether every row has ended.
  [[nodiscard]] bool done() const;
  /// End all rows within one iteration of the engine; they finish with reason cancelled. From any thread.
  void cancel() const;

  [[nodiscard]] const std::vector<std::vector<std::int64_t>>& prompts() const;  ///< token ids of each prompt
  /// Nearest centroid of each prompt; -1 in a bundle without centroids.
  [[nodiscard]] const std::vector<std::int64_t>& cluster_ids() const;
  [[nodiscard]] Mode mode() const;
  [[nodiscard]] std::size_t n() const;  ///< continuations per prompt
  /// Set before the first token in the modes cohort and tenant, else none.
  [[nodiscard]] std::optional<Cohort> cohort() const;
  /// Of each prompt, tokens that were found in the prefix cache. Set before the first token.
  [[nodiscard]] std::vector<std::size_t> cached_tokens() const;

  struct State;  ///< of the library itself
  explicit Stream(std::shared_ptr<State> state);

 private:
  std::shared_ptr<State> state_;
};

}  // namespace chameleon
