// The decoder graph with its key-value cache: tokens in, logits out.
#pragma once

#include <functional>
#include <memory>

#include "session.h"

namespace chameleon {

/// Keys and values of a batch, in buffers that the graph reads and writes in place at each row's own length.
struct Cache {
  /// float32 [batch, heads, capacity, head_dim] of every layer's key and value, in the order of the graph's inputs.
  std::vector<std::unique_ptr<float[]>> buffers;
  std::size_t capacity = 0;
  std::vector<std::int64_t> lengths;  ///< [batch], real tokens per row: the next token's position
};

/// float32 [batch, positions, vocab], in memory of ONNX Runtime. Writable: nobody else reads it.
class Logits {
 public:
  explicit Logits(Ort::Value value) : value_(std::move(value)) {
    const std::vector<std::int64_t> shape = value_.GetTensorTypeAndShapeInfo().GetShape();
    positions_ = static_cast<std::size_t>(shape.at(1));
    vocab_ = static_cast<std::size_t>(shape.at(2));
  }
  [[nodiscard]] std::span<float> at(std::size_t row, std::size_t position = 0) {
    return {value_.GetTensorMutableData<float>() + (row * positions_ + position) * vocab_, vocab_};
  }

 private:
  Ort::Value value_;
  std::size_t positions_, vocab_;
};

/// The factors of the rows of one call.
struct RowFactors {
  FactorSets sets;
  std::vector<std::int64_t> ids;  ///< [batch]
};

using Rows = std::span<const std::span<const std::int64_t>>;

/// One session serves prefill, decoding and scoring. Safe to call from many threads.
class Decoder {
 public:
  /// Throws ManifestError unless the graph's cache is shared: every bundle has such a graph for the CPU.
  Decoder(const GraphSpec& graph, Ort::Session session, const Manifest& manifest);

  /// Read whole prompts.  -> logits after each row's last token, [batch, 1, vocab], and the cache
  /// capacity: how many tokens of a row the cache must be able to hold in the end
  std::pair<Logits, Cache> prefill(Rows rows, const RowFactors& factors, std::size_t capacity,
                                   const Ort::RunOptions& options) const;

  /// One more token per row.  -> logits [batch, 1, vocab]; the cache grows by the token
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
              const Ort::RunOptions& options) const;

  /// Logits [batch, positions, vocab] of every position.
  [[nodiscard]] Logits all_logits(Rows rows, const RowFactors& factors) const;

  /// Leave only some rows in the cache, in ascending order: finished rows leave the batch.
  void keep(Cache& cache, std::span<const std::size_t> rows) const;

 private:
  /// What one call reads beside the factors and the cache: arrays of [batch, width], [batch, positions] and [batch].
  struct Call {
    std::vector<std::int64_t> input_ids, position_ids, logits_positions;
    std::vector<std::int32_t> seqlens_k;  // real tokens of each row after the call, minus one
    std::int32_t total_sequence_length;
  };

  [[nodiscard]] Cache empty_cache(std::size_t batch, std::size_t capacity) const;
  [[nodiscard]] Logits read(Rows rows, std::span<const std::int64_t> factor_ids, const FactorSets& sets, bool last_only,
                            Cache& cache, std::size_t first_row, const Ort::RunOptions& options) const;
  [[nodiscard]] Logits run(const Call& call, std::span<const std::int64_t> factor_ids, const FactorSets& sets,
                           Cache& cache, std::size_t first_row, const Ort::RunOptions& options) const;

  Ort::Session session_;
  ModelSpec model_;
  std::size_t prefill_tokens_;
  std::vector<std::string> names_;  // owns what the next two point to
  std::vector<const char*> input_names_, output_names_;
};

}  // namespace chameleon
