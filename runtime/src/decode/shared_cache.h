// A decoder on ONNX Runtime whose past and present are one buffer, written in place at each row's own length.
#pragma once

#include "decode/prefix_cache.h"
#include "decode/slots.h"
#include "decode/tiled_scorer.h"

namespace chameleon {

/// The CPU's decoder, which scores whole texts and makes slots for the rest. See Decoder.
class SharedCacheDecoder final : public Decoder {
 public:
  SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest);

  void all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                  const std::stop_token& stop) const override;
  [[nodiscard]] std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                               const std::stop_token& stop) const override;
  [[nodiscard]] std::size_t token_bytes() const override { return graph_.cache_bytes(1, 1); }

  /// The state of a batch whose rows join and leave one by one, each of up to `capacity` tokens. It must not outlive
  /// this. See Slots.
  [[nodiscard]] std::unique_ptr<Slots> slots(std::size_t rows, std::size_t capacity, std::stop_token stop = {}) const;
  /// An empty cache of blocks of these keys and values. See PrefixCache.
  [[nodiscard]] std::unique_ptr<PrefixCache> prefix_cache(const std::string& bundle_digest,
                                                          std::size_t max_bytes) const;
  /// Rows times width of the largest call that pays.
  [[nodiscard]] std::size_t prefill_tokens() const;
  /// See SharedCacheGraph.
  [[nodiscard]] bool is_exact() const { return graph_.is_exact(); }

 private:
  /// Read rows in pieces, and give out each piece's first position and its call, whose output is of all positions.
  void read(Rows rows, const RowFactors& factors, BoundCall::Output output, const std::stop_token& stop,
            const std::function<void(Rows piece, std::size_t start, const BoundCall& call)>& take) const;

  SharedCacheGraph graph_;
  TiledScorer scorer_;
  mutable SpareMemory spare_;
};

}  // namespace chameleon
