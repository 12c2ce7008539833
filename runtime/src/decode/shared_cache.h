// A decoder on ONNX Runtime whose past and present are one buffer, written in place at each row's own length.
#pragma once

#include <mutex>

#include "decode/bound_call.h"
#include "decode/decoder.h"
#include "decode/tiled_scorer.h"

namespace chameleon {

/// Key-value memory that one call leaves to the next. The first write to new memory costs time: 2 to 4 % of a prefill
/// in int8.
class SpareMemory {
 public:
  /// Memory of at least one size; its end gives it back.
  class Block {
   public:
    Block(SpareMemory& spare, std::size_t size);
    Block(Block&&) noexcept = default;
    ~Block();
    [[nodiscard]] std::byte* data() const { return bytes_.get(); }

   private:
    SpareMemory& spare_;
    std::unique_ptr<std::byte[]> bytes_;
    std::size_t size_ = 0;
  };

 private:
  std::mutex mutex_;
  std::unique_ptr<std::byte[]> bytes_;  // of the call that ended last
  std::size_t size_ = 0;
};

/// See Decoder. One session reads prompts, runs steps and computes the hidden states for scoring.
class SharedCacheDecoder final : public Decoder {
 public:
  SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest);

  std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors, std::size_t capacity,
                                                    const std::stop_token& stop) const override;
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
              const std::stop_token& stop) const override;
  Logits extend(std::span<const std::int64_t> token_ids, std::size_t past, const RowFactors& factors, Cache& cache,
                const std::stop_token& stop) const override;
  void select(Cache& cache, std::span<const std::size_t> rows) const override;
  void all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                  const std::stop_token& stop) const override;
  [[nodiscard]] std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                               const std::stop_token& stop) const override;
  [[nodiscard]] std::unique_ptr<Slots> slots(std::size_t rows, std::size_t capacity) const override;
  [[nodiscard]] std::size_t token_bytes() const override { return graph_.cache_bytes(1, 1); }

 private:
  struct SharedCache;

  /// Read rows whose cache, beginning at its row `first`, has `start` tokens already. The output is of each row's last
  /// position, or of all positions.
  [[nodiscard]] std::unique_ptr<BoundCall> read(Rows rows, const RowFactors& factors, const CacheBuffers& cache,
                                                std::size_t first, std::size_t start, bool last_only,
                                                BoundCall::Output output, const std::stop_token& stop) const;
  [[nodiscard]] SharedCache empty_cache(std::size_t batch, std::size_t capacity) const;

  SharedCacheGraph graph_;
  TiledScorer scorer_;
  std::size_t prefill_tokens_;
  mutable SpareMemory spare_;
};

}  // namespace chameleon
