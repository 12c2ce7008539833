// A batch whose rows join, prefill, step and leave independently, on one shared key-value buffer.
#pragma once

#include <map>
#include <mutex>

#include "decode/bound_call.h"

namespace chameleon {

/// Key-value memory that one user leaves to the next. The first write to new memory costs time: 2 to 4 % of a prefill
/// in int8.
struct SpareMemory {
  std::mutex mutex;
  std::unique_ptr<std::byte[]> bytes{};  ///< of the user that ended last
  std::size_t size = 0;
};

/// The keys and values of some rows. Their memory comes from `spare` if that is large enough, and returns to it.
class KeyValues {
 public:
  /// Throws LengthError where there is not enough memory.
  KeyValues(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity);
  ~KeyValues();
  KeyValues(const KeyValues&) = delete;
  KeyValues& operator=(const KeyValues&) = delete;
  [[nodiscard]] const CacheBuffers& buffers() const { return buffers_; }

 private:
  SpareMemory& spare_;
  std::unique_ptr<std::byte[]> bytes_;  // becomes resident only where it is written
  std::size_t size_ = 0;
  CacheBuffers buffers_;
};

/// The slots of a batch. Rows 0..n-1 are in use, counted by the caller; nothing is computed for the others. For one
/// thread.
class Slots {
 public:
  /// graph, spare: must outlive this
  /// stop: ends a call that runs, which throws GraphError then
  /// Throws LengthError where there is no memory for the cache.
  Slots(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity,
        std::stop_token stop = {});

  /// Tokens of each row in the cache, [rows].
  [[nodiscard]] std::span<const std::int64_t> lengths() const { return lengths_; }
  /// Whether a step gives what reading its token gives, up to the order of sums; in int8 it rounds otherwise.
  [[nodiscard]] bool is_exact() const { return graph_.is_exact(); }
  /// [rows, 1, vocab], where `step` writes them.
  [[nodiscard]] Logits logits();

  /// Begin a new, empty row.
  void admit(std::size_t row) { lengths_[row] = 0; }

  /// Append tokens to the rows first, first + 1, ... Several rows must be empty: GroupQueryAttention appends several
  /// tokens to a cache that is not empty for a single row only. Returns the logits [n, vocab] after the last token of
  /// each row, or nothing without `wants_logits`.
  /// factors: of these rows
  std::vector<float> prefill(std::size_t first, Rows rows, const RowFactors& factors, bool wants_logits);

  /// Append one token to each of the rows 0..n-1, and write the logits after it.
  /// factors: of these rows
  void step(std::span<const std::int64_t> token_ids, const RowFactors& factors);

  /// Append several tokens to a row, of which some may be cut off again. Returns the logits [1, n, vocab] after each,
  /// valid until the next draft.
  /// factors: of this row
  Logits draft(std::size_t row, std::span<const std::int64_t> token_ids, const RowFactors& factors);
  /// Forget the tokens of a row after the first `length`.
  void cut(std::size_t row, std::int64_t length) { lengths_[row] = length; }

  /// Copy the keys and values of some tokens of a row, from token `start` on, to a block, [buffers, heads, tokens,
  /// head_dim].
  void copy_out(std::size_t row, std::size_t start, std::byte* block, std::size_t tokens) const;
  /// Append a block of so many tokens to a row.
  void copy_in(std::size_t row, const std::byte* block, std::size_t tokens);

  /// Copy row `source` to row `target`.
  void move(std::size_t source, std::size_t target) { fork(source, target, lengths_[source]); }
  /// Exchange two rows.
  void swap(std::size_t row, std::size_t other);
  /// Copy the first `length` tokens of row `source` to row `target`.
  void fork(std::size_t source, std::size_t target, std::int64_t length);

 private:
  [[nodiscard]] std::size_t vocab() const { return static_cast<std::size_t>(graph_.model.vocab_size); }

  const SharedCacheGraph& graph_;
  SpareMemory& spare_;
  std::stop_token stop_;
  KeyValues memory_;
  const CacheBuffers& cache_ = memory_.buffers();
  std::vector<std::int64_t> lengths_;
  std::vector<float> logits_;                                        // [rows, vocab]
  std::map<std::size_t, BoundCall> steps_;                           // by number of rows
  std::map<std::pair<std::size_t, std::size_t>, BoundCall> drafts_;  // by row and number of tokens
};

}  // namespace chameleon
