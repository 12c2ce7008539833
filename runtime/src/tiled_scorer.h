// Log-probabilities from hidden states, by a scorer whose logits never exist at once.
#pragma once

#include "decoder.h"
#include "session.h"

namespace chameleon {

/// scorer_cpu.onnx. Positions of all rows go through the head together, as many as a call takes.
class TiledScorer {
 public:
  TiledScorer(Ort::Session session, const ModelSpec& model) : session_(std::move(session)), model_(model) {}

  /// The log-probabilities of a batch, whose hidden states come in any pieces.
  class Batch {
   public:
    /// rows: of at least two tokens; they and the rest must outlive this
    Batch(const TiledScorer& scorer, Rows rows, const RowFactors& factors, const std::stop_token& stop);
    /// Of the next positions of a row: [n, hidden].
    void add(std::size_t row, std::span<const float> hidden_states);
    /// -> of every row, as Decoder::token_logprobs gives them. Nothing can be added after it.
    std::vector<std::vector<float>> finish();

   private:
    void score();

    const TiledScorer& scorer_;
    Rows rows_;
    const RowFactors& factors_;
    const std::stop_token& stop_;
    std::vector<std::vector<float>> logprobs_;
    std::vector<std::size_t> added_;    // positions of each row so far
    std::vector<std::size_t> waiting_;  // the row of each position that waits
    std::vector<float> hidden_states_;  // [waiting, hidden]
    std::vector<std::int64_t> targets_, cluster_ids_;
  };

 private:
  Ort::Session session_;
  ModelSpec model_;
};

}  // namespace chameleon
