#include "decode/tiled_scorer.h"

#include <algorithm>

#include "factors.h"

namespace chameleon {

namespace {

// Positions per call: smaller calls read the head's weights more often, larger ones evict a tile's logits from cache.
constexpr std::size_t kPositions = 512;

}  // namespace

TiledScorer::Batch::Batch(const TiledScorer& scorer, Rows rows, const RowFactors& factors, const std::stop_token& stop)
    : scorer_(scorer),
      rows_(rows),
      factors_(factors),
      sets_(factors.sets),
      stop_(stop),
      logprobs_(rows.size()),
      added_(rows.size(), 0) {
  std::erase_if(sets_.tensors,
                [](const auto& tensor) { return !in_head(tensor.first); });  // the decoder has applied these
  if (std::ranges::any_of(factors.starts, [](std::int64_t start) { return start > 0; })) {
    sets_ = stack_sets(std::vector{sets_, zero_set(sets_)});
  }
}

void TiledScorer::Batch::add(std::size_t row, std::span<const float> hidden_states) {
  const auto size = static_cast<std::size_t>(scorer_.model_.hidden_size);
  for (; !hidden_states.empty(); hidden_states = hidden_states.subspan(size)) {
    const auto position = hidden_states.first(size);
    hidden_states_.insert(hidden_states_.end(), position.begin(), position.end());
    const bool is_updated = factors_.starts.empty() || std::cmp_greater_equal(added_[row], factors_.starts[row]);
    factor_ids_.push_back(is_updated ? factors_.factor_ids[row] : sets_.count - 1);
    targets_.push_back(rows_[row][++added_[row]]);
    waiting_.push_back(row);
    if (waiting_.size() == kPositions) score();
  }
}

std::vector<std::vector<float>> TiledScorer::Batch::finish() {
  if (!waiting_.empty()) score();
  return std::move(logprobs_);
}

void TiledScorer::Batch::score() {
  const auto count = static_cast<std::int64_t>(waiting_.size());
  std::vector<const char*> input_names = {"hidden_states", "targets"};
  std::vector<Ort::Value> inputs;
  inputs.push_back(tensor_over<float>(hidden_states_, {count, scorer_.model_.hidden_size}));
  inputs.push_back(tensor_over<std::int64_t>(targets_, {count}));
  for (const auto& [name, values] : sets_.tensors) {
    input_names.push_back(name.c_str());
    inputs.push_back(factor_tensor(sets_, values));
  }
  if (inputs.size() > 2) {
    input_names.push_back("factor_ids");
    inputs.push_back(tensor_over<std::int64_t>(factor_ids_, {count}));
  }
  const char* output_names[] = {"logprobs"};
  std::vector<float> logprobs(waiting_.size());
  Ort::Value outputs[] = {tensor_over<float>(logprobs, {count})};
  run_session(scorer_.session_, stop_, input_names, inputs, output_names, outputs);
  for (std::size_t i = 0; i < waiting_.size(); ++i) logprobs_[waiting_[i]].push_back(logprobs[i]);
  for (auto* values : {&targets_, &factor_ids_}) values->clear();
  hidden_states_.clear();
  waiting_.clear();
}

}  // namespace chameleon
