#include "decoder.h"

#include <algorithm>
#include <cstring>

namespace chameleon {

namespace {

// Bound on the largest tensor of one call: attention scores, or logits when scoring.
constexpr std::size_t kPieceBytes = 256 << 20;

Padded pad(Rows rows) {
  Padded tokens{.batch = rows.size(),
                .width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size(),
                .ids = {},
                .mask = {}};
  tokens.ids.resize(tokens.batch * tokens.width);  // the pad id is never attended, any id will do
  tokens.mask.resize(tokens.ids.size());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::ranges::copy(rows[row], tokens.ids.begin() + static_cast<std::ptrdiff_t>(row * tokens.width));
    std::fill_n(tokens.mask.begin() + static_cast<std::ptrdiff_t>(row * tokens.width), rows[row].size(), 1);
  }
  return tokens;
}

Padded columns(const Padded& tokens, std::size_t start, std::size_t width) {
  Padded piece{.batch = tokens.batch, .width = width, .ids = {}, .mask = {}};
  for (std::size_t row = 0; row < tokens.batch; ++row) {
    const auto first = static_cast<std::ptrdiff_t>(row * tokens.width + start);
    piece.ids.insert(piece.ids.end(), tokens.ids.begin() + first,
                     tokens.ids.begin() + first + static_cast<std::ptrdiff_t>(width));
    piece.mask.insert(piece.mask.end(), tokens.mask.begin() + first,
                      tokens.mask.begin() + first + static_cast<std::ptrdiff_t>(width));
  }
  return piece;
}

/// [batch, left] and [batch, right] -> [batch, left + right]
std::vector<std::int64_t> concatenate(std::span<const std::int64_t> left, std::span<const std::int64_t> right,
                                      std::size_t batch) {
  std::vector<std::int64_t> joined;
  joined.reserve(left.size() + right.size());
  for (std::size_t row = 0; row < batch; ++row) {
    for (const auto& part : {left, right}) {
      const auto values = part.subspan(row * (part.size() / batch), part.size() / batch);
      joined.insert(joined.end(), values.begin(), values.end());
    }
  }
  return joined;
}

}  // namespace

Decoder::Decoder(Ort::Session session, const ModelSpec& model)
    : session_(std::move(session)),
      model_(model),
      names_{"input_ids", "attention_mask", "position_ids", "logits_positions", "cluster_ids", "lora_A", "lora_B"} {
  constexpr std::string_view past = "past_key_values";
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> present = {"logits"};
  for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
    const std::string name = session_.GetInputNameAllocated(i, allocator).get();
    if (!name.starts_with(past)) continue;
    names_.push_back(name);
    present.push_back("present" + name.substr(past.size()));
  }
  const auto num_inputs = static_cast<std::ptrdiff_t>(names_.size());
  names_.insert(names_.end(), present.begin(), present.end());
  std::ranges::transform(names_.begin(), names_.begin() + num_inputs, std::back_inserter(input_names_),
                         &std::string::c_str);
  std::ranges::transform(names_.begin() + num_inputs, names_.end(), std::back_inserter(output_names_),
                         &std::string::c_str);
}

std::pair<Logits, Cache> Decoder::prefill(Rows rows, const RowFactors& factors, const Ort::RunOptions& options) const {
  const Padded tokens = pad(rows);
  const std::int64_t shape[] = {static_cast<std::int64_t>(rows.size()), 1, model_.vocab_size};
  Logits logits(Ort::Value::CreateTensor<float>(Ort::AllocatorWithDefaultOptions(), shape, std::size(shape)));
  std::vector<std::int64_t> positions(rows.size());
  Cache cache = empty_cache(rows.size());
  const std::size_t step = piece_width(tokens, false);
  for (std::size_t start = 0; start < tokens.width; start += step) {
    const std::size_t width = std::min(step, tokens.width - start);
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const auto last = static_cast<std::int64_t>(rows[row].size()) - 1 - static_cast<std::int64_t>(start);
      positions[row] = std::clamp<std::int64_t>(last, 0, static_cast<std::int64_t>(width) - 1);
    }
    Logits piece = run(columns(tokens, start, width), positions, factors, cache, options);
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const bool ends_here = rows[row].size() > start && rows[row].size() <= start + width;
      if (ends_here) std::ranges::copy(piece.at(row), logits.at(row).begin());
    }
  }
  return {std::move(logits), std::move(cache)};
}

Logits Decoder::step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache,
                     const Ort::RunOptions& options) const {
  const std::size_t batch = token_ids.size();
  const Padded tokens{batch, 1, {token_ids.begin(), token_ids.end()}, std::vector<std::int64_t>(batch, 1)};
  return run(tokens, std::vector<std::int64_t>(batch, 0), factors, cache, options);
}

void Decoder::all_logits(Rows rows, const RowFactors& factors,
                         const std::function<void(std::size_t, std::size_t, Logits&)>& use) const {
  const Padded tokens = pad(rows);
  Cache cache = empty_cache(rows.size());
  const std::size_t step = piece_width(tokens, true);
  for (std::size_t start = 0; start < tokens.width; start += step) {
    const std::size_t width = std::min(step, tokens.width - start);
    std::vector<std::int64_t> positions(rows.size() * width);
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int64_t>(i % width);
    Logits logits = run(columns(tokens, start, width), positions, factors, cache, Ort::RunOptions());
    use(start, width, logits);
  }
}

Cache Decoder::keep(const Cache& cache, std::span<const std::size_t> rows) const {
  const std::size_t batch = cache.lengths.size(), past = cache.mask.size() / batch;
  Cache kept;
  Ort::AllocatorWithDefaultOptions allocator;
  for (const Ort::Value& tensor : cache.tensors) {
    std::vector<std::int64_t> shape = tensor.GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = static_cast<std::int64_t>(rows.size());
    Ort::Value copy = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
    const std::size_t size = static_cast<std::size_t>(shape[1] * shape[2] * shape[3]);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::memcpy(copy.GetTensorMutableData<float>() + i * size, tensor.GetTensorData<float>() + rows[i] * size,
                  size * sizeof(float));
    }
    kept.tensors.push_back(std::move(copy));
  }
  for (const std::size_t row : rows) {
    const auto mask = std::span(cache.mask).subspan(row * past, past);
    kept.mask.insert(kept.mask.end(), mask.begin(), mask.end());
    kept.lengths.push_back(cache.lengths[row]);
  }
  return kept;
}

Logits Decoder::run(const Padded& tokens, std::span<const std::int64_t> logits_positions, const RowFactors& factors,
                    Cache& cache, const Ort::RunOptions& options) const {
  const auto batch = static_cast<std::int64_t>(tokens.batch), width = static_cast<std::int64_t>(tokens.width);
  std::vector<std::int64_t> attention_mask = concatenate(cache.mask, tokens.mask, tokens.batch);
  std::vector<std::int64_t> position_ids(tokens.ids.size());
  std::vector<std::int64_t> lengths = cache.lengths;
  for (std::size_t row = 0; row < tokens.batch; ++row) {
    for (std::size_t i = row * tokens.width; i < (row + 1) * tokens.width; ++i) {
      lengths[row] += tokens.mask[i];
      position_ids[i] = std::max(lengths[row] - 1, cache.lengths[row]);
    }
  }
  const FactorSets& sets = factors.sets;
  const std::int64_t total = static_cast<std::int64_t>(attention_mask.size()) / batch;
  const std::int64_t positions = static_cast<std::int64_t>(logits_positions.size()) / batch;
  std::vector<Ort::Value> inputs;
  inputs.reserve(input_names_.size());
  inputs.push_back(tensor_over<std::int64_t>(tokens.ids, {batch, width}));
  inputs.push_back(tensor_over<std::int64_t>(attention_mask, {batch, total}));
  inputs.push_back(tensor_over<std::int64_t>(position_ids, {batch, width}));
  inputs.push_back(tensor_over<std::int64_t>(logits_positions, {batch, positions}));
  inputs.push_back(tensor_over<std::int64_t>(factors.ids, {batch}));
  inputs.push_back(tensor_over<float>(sets.lora_A, {sets.count, sets.rank, model_.hidden_size}));
  inputs.push_back(tensor_over<float>(sets.lora_B, {sets.count, sets.rank, model_.vocab_size}));
  // Past tensors go in and present ones come out by handle: keys and values are never copied here.
  std::ranges::move(cache.tensors, std::back_inserter(inputs));
  std::vector<Ort::Value> outputs;
  for (std::size_t i = 0; i < output_names_.size(); ++i) outputs.emplace_back(nullptr);
  run_session(session_, options, input_names_, inputs, output_names_, outputs);
  cache.tensors.clear();
  std::move(outputs.begin() + 1, outputs.end(), std::back_inserter(cache.tensors));
  cache.mask = std::move(attention_mask);
  cache.lengths = std::move(lengths);
  return Logits(std::move(outputs.front()));
}

Cache Decoder::empty_cache(std::size_t batch) const {
  Cache cache{{}, {}, std::vector<std::int64_t>(batch, 0)};
  const std::int64_t shape[] = {static_cast<std::int64_t>(batch), model_.num_key_value_heads, 0, model_.head_dim};
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 1; i < output_names_.size(); ++i) {
    cache.tensors.push_back(Ort::Value::CreateTensor<float>(allocator, shape, std::size(shape)));
  }
  return cache;
}

std::size_t Decoder::piece_width(const Padded& tokens, bool all_logits) const {
  const std::size_t attention = static_cast<std::size_t>(model_.num_attention_heads) * tokens.width;
  const std::size_t logits = all_logits ? static_cast<std::size_t>(model_.vocab_size) : 0;
  return std::max<std::size_t>(1, kPieceBytes / (tokens.batch * sizeof(float) * std::max(attention, logits)));
}

}  // namespace chameleon
