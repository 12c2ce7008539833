// A decoder: tokens in, logits out. It generates with Slots (SharedCacheDecoder) or as a StaticDecoder.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <stop_token>
#include <utility>
#include <vector>

#include "chameleon/factors.h"

namespace chameleon {

/// float32 [batch, positions, vocab] in host memory. Writable: nobody else reads it.
class Logits {
 public:
  /// owner: keeps `values` alive; null where they are valid until the decoder's next call on the cache
  Logits(float* values, std::size_t positions, std::size_t vocab, std::shared_ptr<void> owner = nullptr)
      : values_(values), positions_(positions), vocab_(vocab), owner_(std::move(owner)) {}
  [[nodiscard]] std::span<float> at(std::size_t row, std::size_t position = 0) {
    return {values_ + (row * positions_ + position) * vocab_, vocab_};
  }
  [[nodiscard]] std::size_t positions() const { return positions_; }

 private:
  float* values_;
  std::size_t positions_, vocab_;
  std::shared_ptr<void> owner_;
};

using Rows = std::span<const std::span<const std::int64_t>>;

/// Takes the logits of all positions of some rows, of which the first is position `start`. Valid during the call only.
using TakeLogits = std::function<void(std::size_t start, Logits logits)>;

/// What every decoder has: scoring. Many threads may call one decoder.
/// A call may throw an Error when its stop is requested while it runs.
class Decoder {
 public:
  virtual ~Decoder() = default;

  /// Give out the logits [batch, positions, vocab] of every position, in pieces.
  /// rows: a row whose update begins later is alone
  virtual void all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                          const std::stop_token& stop) const = 0;

  /// The log-probability of each token after the first, for every row.
  /// rows: at least two tokens each. Rows of similar length should be adjacent: they share a call
  [[nodiscard]] virtual std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                                       const std::stop_token& stop) const = 0;

  /// The bytes of the keys and values of one token of a row in main memory; 0 where they are elsewhere.
  [[nodiscard]] virtual std::size_t token_bytes() const { return 0; }
};

/// Keys and values of a batch, in the layout of one kind of decoder. It belongs to one thread.
class Cache {
 public:
  virtual ~Cache() = default;
};

/// A decoder whose rows begin together, and leave when they have ended.
class StaticDecoder : public Decoder {
 public:
  /// Read whole prompts. Returns the logits after each row's last token, [batch, 1, vocab], and the cache.
  /// capacity: the number of tokens of a row that the cache must be able to hold in the end
  virtual std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors,
                                                            std::size_t capacity) const = 0;

  /// Read one more token per row, which the cache then holds too. Returns logits [batch, 1, vocab].
  virtual Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache) const = 0;

  /// Select the rows of the cache that stay, in ascending order: finished rows leave the batch.
  virtual void select(Cache& cache, std::span<const std::size_t> rows) const = 0;
};

/// The tokens of each row that a decoder reads for scoring: all but the last, which predicts nothing.
std::vector<std::span<const std::int64_t>> without_last(Rows rows);

/// Consecutive rows that share a call.
struct Part {
  std::size_t first;
  std::size_t count;
  [[nodiscard]] std::vector<std::size_t> indices() const;
};

/// Split rows into calls of at most `max_rows` rows whose padded size is at most `tokens`; a longer row goes alone.
/// starts: see RowFactors; rows whose update begins later go alone, too
std::vector<Part> parts(Rows rows, std::size_t tokens, std::size_t max_rows = std::numeric_limits<std::size_t>::max(),
                        std::span<const std::int64_t> starts = {});

}  // namespace chameleon
