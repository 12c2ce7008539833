// A decoder on ONNX Runtime whose past and present are one buffer, written in place at each row's own length.
#pragma once

#include "decoder.h"
#include "session.h"
#include "tiled_scorer.h"

namespace chameleon {

/// See Decoder. One session reads prompts, runs steps and computes the hidden states for scoring.
class SharedCacheDecoder final : public Decoder {
 public:
  SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest);

  std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors, std::size_t capacity,
                                                    const std::stop_token& stop) const override;
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
              const std::stop_token& stop) const override;
  [[nodiscard]] std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                               const std::stop_token& stop) const override;
  void select(Cache& cache, std::span<const std::size_t> rows) const override;

 private:
  struct Buffers final : Cache {
    /// [batch, heads, capacity, head_dim] of every layer's key and value, in the order of the graph's inputs: float32,
    /// or int8 in an int8 bundle.
    std::vector<std::unique_ptr<std::byte[]>> values;
    std::size_t capacity = 0;
    std::vector<std::int64_t> lengths;  ///< [batch], real tokens per row: the next token's position
    /// Tensors of the last call. Those over `values` are reused while calls are over the same rows: creating them costs
    /// 20 us per step.
    std::vector<Ort::Value> inputs, outputs;
    std::size_t first_row = 0;
    std::int64_t batch = 0;
  };

  /// The output of a call besides the cache: logits after each row's last token, or hidden states of all positions.
  enum class Output { logits, hidden_states };

  /// The inputs of one call besides the factors and the cache.
  struct Call {
    std::vector<std::int64_t> input_ids, position_ids;  // [batch, width]
    std::vector<std::int64_t> logits_positions;         // [batch, positions]
    std::int64_t num_logits;                            // how many of a row's positions get logits: the first ones
    std::vector<std::int32_t> seqlens_k;                // real tokens of each row after the call, minus one
    std::int32_t total_sequence_length;
  };

  /// Bytes of one row in one buffer.
  [[nodiscard]] std::size_t row_bytes(std::size_t capacity) const;
  [[nodiscard]] std::unique_ptr<Buffers> empty_cache(std::size_t batch, std::size_t capacity) const;
  /// Read whole rows into the cache, beginning at its row first_row.
  [[nodiscard]] Ort::Value read(Output output, Rows rows, const RowFactors& factors, Buffers& cache,
                                std::size_t first_row, const std::stop_token& stop) const;
  [[nodiscard]] Ort::Value run(Output output, const Call& call, const RowFactors& factors, Buffers& cache,
                               std::size_t first_row, const std::stop_token& stop) const;

  Ort::Session session_;
  TiledScorer scorer_;
  ModelSpec model_;
  std::size_t prefill_tokens_;
  ONNXTensorElementDataType cache_type_;
  std::vector<std::string> names_;  // owns the characters that the next two point to
  std::vector<const char*> input_names_, present_names_;
};

}  // namespace chameleon
