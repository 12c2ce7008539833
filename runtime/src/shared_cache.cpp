#include "shared_cache.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "chameleon/error.h"

namespace chameleon {

namespace {

// Rows times width of one call that reads prompts. It bounds the memory of activations and costs no time at this size.
// It is smaller in int8, whose activations then stay in the processor's cache.
constexpr std::size_t kPrefillTokens = 2048, kInt8Tokens = 256;

// The same for calls that compute the hidden states of all positions.
constexpr std::size_t kScoredTokens = 256;

/// Logits [batch, 1, vocab] in the memory that ONNX Runtime wrote them to.
Logits logits_of(Ort::Value value) {
  const std::vector<std::int64_t> shape = value.GetTensorTypeAndShapeInfo().GetShape();
  const auto owner = std::make_shared<Ort::Value>(std::move(value));
  return {owner->GetTensorMutableData<float>(), 1, static_cast<std::size_t>(shape.at(1)), owner};
}

}  // namespace

SharedCacheDecoder::SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest)
    : session_(std::move(session)),
      scorer_(std::move(scorer)),
      model_(manifest.model),
      prefill_tokens_(manifest.precision == "int8" ? kInt8Tokens : kPrefillTokens),
      cache_type_(manifest.precision == "int8" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                                               : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
  std::vector<std::string> present;
  for (std::int64_t layer = 0; layer < model_.num_layers; ++layer) {
    for (const char* kind : {".key", ".value"}) {
      const std::string name = "." + std::to_string(layer) + kind;
      names_.push_back("past_key_values" + name);
      present.push_back("present" + name);
    }
  }
  for (const char* name : {"input_ids", "position_ids", "logits_positions", "num_logits", "seqlens_k",
                           "total_sequence_length", "factor_ids"}) {
    names_.emplace_back(name);
  }
  for (const auto& [name, width] : manifest.adaptation.factor_widths()) names_.push_back(name);
  const auto num_inputs = static_cast<std::ptrdiff_t>(names_.size());
  names_.insert(names_.end(), present.begin(), present.end());
  std::ranges::transform(names_.begin(), names_.begin() + num_inputs, std::back_inserter(input_names_),
                         &std::string::c_str);
  std::ranges::transform(names_.begin() + num_inputs, names_.end(), std::back_inserter(present_names_),
                         &std::string::c_str);
}

std::pair<Logits, std::unique_ptr<Cache>> SharedCacheDecoder::prefill(Rows rows, const RowFactors& factors,
                                                                      std::size_t capacity,
                                                                      const std::stop_token& stop) const {
  for (const auto& row : rows) capacity = std::max(capacity, row.size());
  auto cache = empty_cache(rows.size(), capacity);
  const auto vocab = static_cast<std::size_t>(model_.vocab_size);
  const auto values = std::make_shared<std::vector<float>>(rows.size() * vocab);
  Logits logits(values->data(), 1, vocab, values);
  for (const Part& part : parts(rows, prefill_tokens_)) {
    const Rows members = rows.subspan(part.first, part.count);
    Logits read_logits =
        logits_of(read(Output::logits, members, factors.rows(part.indices()), *cache, part.first, stop));
    for (std::size_t row = 0; row < part.count; ++row) {
      std::ranges::copy(read_logits.at(row), logits.at(part.first + row).begin());
    }
  }
  return {std::move(logits), std::move(cache)};
}

Logits SharedCacheDecoder::step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& any_cache,
                                const std::stop_token& stop) const {
  auto& cache = dynamic_cast<Buffers&>(any_cache);
  const Call call{.input_ids = {token_ids.begin(), token_ids.end()},
                  .position_ids = cache.lengths,
                  .logits_positions = std::vector<std::int64_t>(token_ids.size(), 0),
                  .num_logits = 1,
                  .seqlens_k = {cache.lengths.begin(), cache.lengths.end()},
                  .total_sequence_length = static_cast<std::int32_t>(std::ranges::max(cache.lengths)) + 1};
  Logits logits = logits_of(run(Output::logits, call, factors, cache, 0, stop));
  for (std::int64_t& length : cache.lengths) ++length;
  return logits;
}

std::vector<std::vector<float>> SharedCacheDecoder::token_logprobs(Rows rows, const RowFactors& factors,
                                                                   const std::stop_token& stop) const {
  TiledScorer::Batch batch(scorer_, rows, factors, stop);
  const std::vector inputs = without_last(rows);
  for (const Part& part : parts(inputs, kScoredTokens)) {
    const Rows members = Rows(inputs).subspan(part.first, part.count);
    const std::size_t width = std::ranges::max(members, {}, &std::span<const std::int64_t>::size).size();
    const auto cache = empty_cache(part.count, width);
    const Ort::Value states = read(Output::hidden_states, members, factors.rows(part.indices()), *cache, 0, stop);
    const auto hidden_size = static_cast<std::size_t>(model_.hidden_size);
    for (std::size_t row = 0; row < part.count; ++row) {
      batch.add(part.first + row,
                {states.GetTensorData<float>() + row * width * hidden_size, members[row].size() * hidden_size});
    }
  }
  return batch.finish();
}

void SharedCacheDecoder::select(Cache& any_cache, std::span<const std::size_t> rows) const {
  auto& cache = dynamic_cast<Buffers&>(any_cache);
  const std::size_t row_size = row_bytes(cache.capacity);
  for (auto& buffer : cache.values) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (i != rows[i]) std::memcpy(&buffer[i * row_size], &buffer[rows[i] * row_size], row_size);
    }
  }
  for (std::size_t i = 0; i < rows.size(); ++i) cache.lengths[i] = cache.lengths[rows[i]];
  cache.lengths.resize(rows.size());
}

Ort::Value SharedCacheDecoder::read(Output output, Rows rows, const RowFactors& factors, Buffers& cache,
                                    std::size_t first_row, const std::stop_token& stop) const {
  const std::size_t width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  Call call{.input_ids = std::vector<std::int64_t>(rows.size() * width),  // padding is never attended: any id will do
            .position_ids = std::vector<std::int64_t>(rows.size() * width),
            .logits_positions = {},
            .num_logits = output == Output::logits ? 1 : 0,
            .seqlens_k = {},
            .total_sequence_length = static_cast<std::int32_t>(width)};
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::ranges::copy(rows[row], call.input_ids.begin() + static_cast<std::ptrdiff_t>(row * width));
    for (std::size_t i = 0; i < width; ++i) call.position_ids[row * width + i] = static_cast<std::int64_t>(i);
    const auto length = static_cast<std::int64_t>(rows[row].size());
    if (output == Output::logits) call.logits_positions.push_back(length - 1);
    call.seqlens_k.push_back(static_cast<std::int32_t>(length - 1));
    cache.lengths[first_row + row] = length;
  }
  if (output == Output::hidden_states) call.logits_positions = call.position_ids;
  return run(output, call, factors, cache, first_row, stop);
}

Ort::Value SharedCacheDecoder::run(Output output, const Call& call, const RowFactors& factors, Buffers& cache,
                                   std::size_t first_row, const std::stop_token& stop) const {
  const auto batch = static_cast<std::int64_t>(call.seqlens_k.size());
  const auto columns = [batch](std::span<const std::int64_t> values) {
    return static_cast<std::int64_t>(values.size()) / batch;
  };
  auto& inputs = cache.inputs;
  auto& outputs = cache.outputs;
  if (cache.batch != batch || cache.first_row != first_row) {
    inputs.clear();
    outputs.clear();
    const auto capacity = static_cast<std::int64_t>(cache.capacity);
    const std::size_t row_size = row_bytes(cache.capacity);
    for (const auto& buffer : cache.values) {
      // Past and present are the same memory: the graph writes in place.
      const std::span<std::byte> rows(&buffer[first_row * row_size], static_cast<std::size_t>(batch) * row_size);
      for (auto* values : {&inputs, &outputs}) {
        values->push_back(
            tensor_over(rows, cache_type_, {batch, model_.num_key_value_heads, capacity, model_.head_dim}));
      }
    }
    cache.first_row = first_row;
    cache.batch = batch;
  }
  inputs.resize(cache.values.size());
  outputs.resize(cache.values.size());
  inputs.push_back(tensor_over<std::int64_t>(call.input_ids, {batch, columns(call.input_ids)}));
  inputs.push_back(tensor_over<std::int64_t>(call.position_ids, {batch, columns(call.position_ids)}));
  inputs.push_back(tensor_over<std::int64_t>(call.logits_positions, {batch, columns(call.logits_positions)}));
  inputs.push_back(tensor_over<std::int64_t>(std::span(&call.num_logits, 1), {1}));
  inputs.push_back(tensor_over<std::int32_t>(call.seqlens_k, {batch}));
  inputs.push_back(tensor_over<std::int32_t>(std::span(&call.total_sequence_length, 1), {}));
  inputs.push_back(tensor_over<std::int64_t>(factors.factor_ids, {batch}));
  for (const auto& [name, values] : factors.sets.tensors) inputs.push_back(factor_tensor(factors.sets, values));
  outputs.emplace_back(nullptr);
  std::vector<const char*> output_names = present_names_;
  output_names.push_back(output == Output::logits ? "logits" : "hidden_states");
  run_session(session_, stop, input_names_, inputs, output_names, outputs);
  return std::move(outputs.back());
}

std::unique_ptr<SharedCacheDecoder::Buffers> SharedCacheDecoder::empty_cache(std::size_t batch,
                                                                             std::size_t capacity) const try {
  auto cache = std::make_unique<Buffers>();
  cache->capacity = capacity;
  cache->lengths.assign(batch, 0);
  for (std::size_t i = 0; i < present_names_.size(); ++i) {
    cache->values.push_back(std::make_unique_for_overwrite<std::byte[]>(batch * row_bytes(capacity)));
  }
  return cache;
} catch (const std::bad_alloc&) {
  throw LengthError("no memory for a cache of " + std::to_string(batch) + " rows of " + std::to_string(capacity) +
                    " tokens: pass fewer rows or a smaller max_new_tokens");
}

std::size_t SharedCacheDecoder::row_bytes(std::size_t capacity) const {
  const std::size_t item = cache_type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 ? sizeof(std::int8_t) : sizeof(float);
  return static_cast<std::size_t>(model_.num_key_value_heads * model_.head_dim) * capacity * item;
}

}  // namespace chameleon
