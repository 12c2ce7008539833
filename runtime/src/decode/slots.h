// A batch whose rows join, prefill, step and leave independently, on one key-value cache that is allocated once.
#pragma once

#include <map>

#include "decode/shared_cache.h"

namespace chameleon {

/// The slots of a batch. Rows 0..n-1 are in use, counted by the caller; nothing is computed for the others. For one
/// thread.
class Slots {
 public:
  /// Throws LengthError where there is no memory for the cache.
  /// graph, spare: must outlive this
  Slots(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity);

  /// Tokens of each row in the cache, [rows].
  [[nodiscard]] std::span<const std::int64_t> lengths() const { return lengths_; }
  /// Whether a step gives what reading its token gives, up to the order of sums; in int8 it rounds otherwise.
  [[nodiscard]] bool is_exact() const { return graph_.cache_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  /// The logits [vocab] of a row, where `step` writes them.
  [[nodiscard]] std::span<float> logits(std::size_t row);

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

  /// Copy row `source` to row `target`.
  void move(std::size_t source, std::size_t target) { fork(source, target, lengths_[source]); }
  /// Copy the first `length` tokens of row `source` to row `target`.
  void fork(std::size_t source, std::size_t target, std::int64_t length);

 private:
  const SharedCacheGraph& graph_;
  SpareMemory& spare_;
  std::vector<std::int64_t> lengths_;
  std::unique_ptr<std::byte[]> memory_;  // becomes resident only where it is written
  CacheBuffers cache_;
  std::vector<float> logits_;               // [rows, vocab]
  std::map<std::size_t, BoundCall> steps_;  // by number of rows
};

}  // namespace chameleon
