#include "tiled_scorer.h"

namespace chameleon {

namespace {

// Of one call: fewer read the head's weights more often, of more a tile's logits leave the processor's cache.
constexpr std::size_t kPositions = 512;

}  // namespace

TiledScorer::Batch::Batch(const TiledScorer& scorer, Rows rows, const RowFactors& factors, const std::stop_token& stop)
    : scorer_(scorer), rows_(rows), factors_(factors), stop_(stop), logprobs_(rows.size()), added_(rows.size(), 0) {}

void TiledScorer::Batch::add(std::size_t row, std::span<const float> hidden_states) {
  const auto size = static_cast<std::size_t>(scorer_.model_.hidden_size);
  for (; !hidden_states.empty(); hidden_states = hidden_states.subspan(size)) {
    const auto position = hidden_states.first(size);
    hidden_states_.insert(hidden_states_.end(), position.begin(), position.end());
    targets_.push_back(rows_[row][++added_[row]]);
    cluster_ids_.push_back(factors_.ids[row]);
    waiting_.push_back(row);
    if (waiting_.size() == kPositions) score();
  }
}

std::vector<std::vector<float>> TiledScorer::Batch::finish() {
  if (!waiting_.empty()) score();
  return std::move(logprobs_);
}

void TiledScorer::Batch::score() {
  const ModelSpec& model = scorer_.model_;
  const FactorSets& sets = factors_.sets;
  const auto count = static_cast<std::int64_t>(waiting_.size());
  const char* input_names[] = {"hidden_states", "targets", "cluster_ids", "lora_A", "lora_B"};
  const char* output_names[] = {"logprobs"};
  const Ort::Value inputs[] = {tensor_over<float>(hidden_states_, {count, model.hidden_size}),
                               tensor_over<std::int64_t>(targets_, {count}),
                               tensor_over<std::int64_t>(cluster_ids_, {count}),
                               tensor_over<float>(sets.lora_A, {sets.count, sets.rank, model.hidden_size}),
                               tensor_over<float>(sets.lora_B, {sets.count, sets.rank, model.vocab_size})};
  std::vector<float> logprobs(waiting_.size());
  Ort::Value outputs[] = {tensor_over<float>(logprobs, {count})};
  run_session(scorer_.session_, stop_, input_names, inputs, output_names, outputs);
  for (std::size_t i = 0; i < waiting_.size(); ++i) logprobs_[waiting_[i]].push_back(logprobs[i]);
  for (auto* values : {&targets_, &cluster_ids_}) values->clear();
  hidden_states_.clear();
  waiting_.clear();
}

}  // namespace chameleon
