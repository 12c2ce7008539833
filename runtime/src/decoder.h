// A decoder: tokens in, logits out, with a key-value cache of its own kind.
#pragma once

#include <limits>
#include <memory>
#include <span>
#include <stop_token>
#include <utility>
#include <vector>

#include "chameleon/bundle.h"

namespace chameleon {

/// Keys and values of a batch, kept as a decoder keeps them.
class Cache {
 public:
  virtual ~Cache() = default;
};

/// float32 [batch, positions, vocab] in memory of the host. Writable: nobody else reads it.
class Logits {
 public:
  /// owner: keeps `values` alive
  Logits(float* values, std::size_t positions, std::size_t vocab, std::shared_ptr<void> owner)
      : values_(values), positions_(positions), vocab_(vocab), owner_(std::move(owner)) {}
  [[nodiscard]] std::span<float> at(std::size_t row, std::size_t position = 0) {
    return {values_ + (row * positions_ + position) * vocab_, vocab_};
  }

 private:
  float* values_;
  std::size_t positions_, vocab_;
  std::shared_ptr<void> owner_;
};

/// The factors of the rows of one call.
struct RowFactors {
  FactorSets sets;
  std::vector<std::int64_t> ids;  ///< [batch]
};

using Rows = std::span<const std::span<const std::int64_t>>;

/// It serves prefill, decoding and scoring. Safe to call from many threads, one cache in one thread.
/// A call whose stop is requested while it runs may throw an Error.
class Decoder {
 public:
  virtual ~Decoder() = default;

  /// Read whole prompts.  -> logits after each row's last token, [batch, 1, vocab], and the cache
  /// capacity: how many tokens of a row the cache must be able to hold in the end
  virtual std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors, std::size_t capacity,
                                                            const std::stop_token& stop) const = 0;

  /// One more token per row.  -> logits [batch, 1, vocab]; the cache grows by the token
  virtual Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
                      const std::stop_token& stop) const = 0;

  /// Of every row the log-probability of each token after the first.
  /// rows: of at least two tokens. Those of similar length are best beside each other, where they share a call
  [[nodiscard]] virtual std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                                       const std::stop_token& stop) const = 0;

  /// Leave only some rows in the cache, in ascending order: finished rows leave the batch.
  virtual void keep(Cache& cache, std::span<const std::size_t> rows) const = 0;
};

/// What a decoder reads of rows that are scored: the last token predicts nothing.
std::vector<std::span<const std::int64_t>> without_last(Rows rows);

/// Consecutive rows that share a call.
struct Part {
  std::size_t first;
  std::size_t count;
};

/// Split rows into calls of at most `max_rows` rows whose padded size is at most `tokens`; a longer row goes alone.
std::vector<Part> parts(Rows rows, std::size_t tokens, std::size_t max_rows = std::numeric_limits<std::size_t>::max());

}  // namespace chameleon
