// Log-probabilities from hidden states, by a graph that never holds all logits at once.
#pragma once

#include "decode/decoder.h"
#include "decode/session.h"

namespace chameleon {

/// hidden_scorer.onnx. Positions of all rows share calls of a fixed size.
class TiledScorer {
 public:
  TiledScorer(Ort::Session session, const ModelSpec& model) : session_(std::move(session)), model_(model) {}

  /// Collects the log-probabilities of a batch, whose hidden states are added in pieces of any size.
  class Batch {
   public:
    /// rows: at least two tokens each. All arguments must outlive this
    Batch(const TiledScorer& scorer, Rows rows, const RowFactors& factors, const std::stop_token& stop);
    /// Add hidden states [n, hidden] of the next positions of a row.
    void add(std::size_t row, std::span<const float> hidden_states);
    /// The log-probabilities of every row, as Decoder::token_logprobs returns them. Nothing can be added afterwards.
    std::vector<std::vector<float>> finish();

   private:
    void score();

    const TiledScorer& scorer_;
    Rows rows_;
    const RowFactors& factors_;
    FactorSets sets_;  // of the head; a set of zeros last where the update of a row begins later
    const std::stop_token& stop_;
    std::vector<std::vector<float>> logprobs_;
    std::vector<std::size_t> added_;    // positions of each row so far
    std::vector<std::size_t> waiting_;  // the row of each position that is not scored yet
    std::vector<float> hidden_states_;  // [waiting, hidden]
    std::vector<std::int64_t> targets_, factor_ids_;
  };

 private:
  Ort::Session session_;
  ModelSpec model_;
};

}  // namespace chameleon
