// The decoder graph with its key-value cache: tokens in, logits out.
#pragma once

#include <functional>

#include "session.h"

namespace chameleon {

/// Keys and values of a batch.
struct Cache {
  std::vector<Ort::Value> tensors;    ///< float32 [batch, heads, past, head_dim], in the order of the graph's inputs
  std::vector<std::int64_t> mask;     ///< [batch, past], 1 where the slot holds a real token
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

/// Right-padded ids and their mask, [batch, width].
struct Padded {
  std::size_t batch = 0, width = 0;
  std::vector<std::int64_t> ids, mask;
};

using Rows = std::span<const std::span<const std::int64_t>>;

/// One session serves prefill, decoding and scoring. Safe to call from many threads.
class Decoder {
 public:
  Decoder(Ort::Session session, const ModelSpec& model);

  /// Read whole prompts.  -> logits after each row's last token, [batch, 1, vocab], and the cache
  std::pair<Logits, Cache> prefill(Rows rows, const RowFactors& factors, const Ort::RunOptions& options) const;

  /// One more token per row.  -> logits [batch, 1, vocab]; the cache grows
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
              const Ort::RunOptions& options) const;

  /// Logits of every position, piece by piece, each given to `use` with its first position and their number.
  void all_logits(Rows rows, const RowFactors& factors,
                  const std::function<void(std::size_t, std::size_t, Logits&)>& use) const;

  /// The cache of some rows only: finished rows leave the batch. The one copy of a cache outside the graph.
  [[nodiscard]] Cache keep(const Cache& cache, std::span<const std::size_t> rows) const;

 private:
  Logits run(const Padded& tokens, std::span<const std::int64_t> logits_positions, const RowFactors& factors,
             Cache& cache, const Ort::RunOptions& options) const;
  [[nodiscard]] Cache empty_cache(std::size_t batch) const;
  [[nodiscard]] std::size_t piece_width(const Padded& tokens, bool all_logits) const;

  Ort::Session session_;
  ModelSpec model_;
  std::vector<std::string> names_;  // owns what the next two point to
  std::vector<const char*> input_names_, output_names_;
};

}  // namespace chameleon
