#include "decode/bound_call.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include "contract/precision.h"
#include "factors.h"

namespace chameleon {

SharedCacheGraph::SharedCacheGraph(Ort::Session opened, const Manifest& manifest)
    : session(std::move(opened)),
      model(manifest.model),
      cache_type(is_integer(manifest.precision) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                                                : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
  for (std::int64_t layer = 0; layer < model.num_layers; ++layer) {
    for (const char* kind : {".key", ".value"}) {
      const std::string name = "." + std::to_string(layer) + kind;
      past.push_back("past_key_values" + name);
      present.push_back("present" + name);
    }
  }
  for (const auto& [name, width] : manifest.adaptation.factor_widths()) factors.push_back(name);
  has_columns = !std::ranges::all_of(factors, in_head);
}

std::size_t SharedCacheGraph::row_bytes(std::size_t capacity) const {
  const std::size_t item = cache_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 ? sizeof(std::int8_t) : sizeof(float);
  return static_cast<std::size_t>(model.num_key_value_heads * model.head_dim) * capacity * item;
}

std::size_t SharedCacheGraph::cache_bytes(std::size_t rows, std::size_t capacity) const {
  const std::size_t row = past.size() * row_bytes(capacity);
  if (rows > std::numeric_limits<std::ptrdiff_t>::max() / std::max<std::size_t>(row, 1)) throw std::bad_alloc();
  return rows * row;
}

void CacheBuffers::copy_row(const SharedCacheGraph& graph, const CacheBuffers& other, std::size_t source,
                            std::size_t target, std::size_t length, std::size_t from, std::size_t to) const {
  const auto heads = static_cast<std::size_t>(graph.model.num_key_value_heads);
  const std::size_t token = graph.row_bytes(1) / heads;
  const auto place_of = [&](const CacheBuffers& buffers, std::size_t buffer, std::size_t row, std::size_t head) {
    return buffers.memory + ((buffer * buffers.rows + row) * heads + head) * buffers.capacity * token;
  };
  for (std::size_t buffer = 0; buffer < graph.past.size(); ++buffer) {
    for (std::size_t head = 0; head < heads; ++head) {
      std::memcpy(place_of(*this, buffer, target, head) + to * token,
                  place_of(other, buffer, source, head) + from * token, length * token);
    }
  }
}

BoundCall::BoundCall(const SharedCacheGraph& graph, const CacheBuffers& cache, std::size_t first, std::size_t batch,
                     std::size_t width, std::size_t positions, Output kind, std::span<float> output)
    : input_ids(batch * width),  // padding is never attended: any id will do
      position_ids(batch * width),
      logits_positions(batch * positions),
      seqlens_k(batch),
      graph_(graph),
      num_logits_(kind == Output::logits ? static_cast<std::int64_t>(positions) : 0),
      factor_ids_(batch),
      output_(output) {
  const auto of = [](std::size_t size) { return static_cast<std::int64_t>(size); };
  const ModelSpec& model = graph.model;
  const std::int64_t last = kind == Output::logits ? model.vocab_size : model.hidden_size;
  if (output_.empty()) {
    own_output_.resize(batch * positions * static_cast<std::size_t>(last));
    output_ = own_output_;
  }
  bind_input<std::int64_t>("input_ids", input_ids, {of(batch), of(width)});
  bind_input<std::int64_t>("position_ids", position_ids, {of(batch), of(width)});
  bind_input<std::int64_t>("logits_positions", logits_positions, {of(batch), of(positions)});
  bind_input<std::int64_t>("num_logits", std::span(&num_logits_, 1), {1});
  bind_input<std::int32_t>("seqlens_k", seqlens_k, {of(batch)});
  bind_input<std::int32_t>("total_sequence_length", std::span(&total_sequence_length, 1), {});
  bind_input<std::int64_t>("factor_ids", factor_ids_, {of(batch)});
  output_names_.push_back(kind == Output::logits ? "logits" : "hidden_states");
  outputs_.push_back(kind == Output::logits ? tensor_over<float>(output_, {of(batch * positions), last})
                                            : tensor_over<float>(output_, {of(batch), of(positions), last}));
  const std::size_t row_size = graph.row_bytes(cache.capacity);
  for (std::size_t buffer = 0; buffer < graph.past.size(); ++buffer) {
    // Past and present are the same memory: the graph writes in place.
    const std::span rows(cache.memory + (buffer * cache.rows + first) * row_size, batch * row_size);
    const auto tensor = [&] {
      return tensor_over(rows, graph.cache_type,
                         {of(batch), model.num_key_value_heads, of(cache.capacity), model.head_dim});
    };
    input_names_.push_back(graph.past[buffer].c_str());
    inputs_.push_back(tensor());
    output_names_.push_back(graph.present[buffer].c_str());
    outputs_.push_back(tensor());
  }
  for (const std::string& name : graph.factors) {
    input_names_.push_back(name.c_str());
    inputs_.emplace_back(nullptr);
  }
  if (graph.has_columns) {
    input_names_.push_back("column_ids");
    inputs_.emplace_back(nullptr);
  }
}

void BoundCall::append(Rows rows, std::span<const std::int64_t> lengths) {
  const std::size_t width = input_ids.size() / rows.size(), positions = logits_positions.size() / rows.size();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::int64_t added = std::ssize(rows[row]);
    std::ranges::copy(rows[row], std::span(input_ids).subspan(row * width).begin());
    const auto places = std::span(position_ids).subspan(row * width, width);
    std::iota(places.begin(), places.end(), lengths[row]);
    const auto outputs = std::span(logits_positions).subspan(row * positions, positions);
    std::iota(outputs.begin(), outputs.end(), positions == 1 ? added - 1 : 0);
    seqlens_k[row] = static_cast<std::int32_t>(lengths[row] + added - 1);
  }
  total_sequence_length = static_cast<std::int32_t>(std::ranges::max(lengths) + static_cast<std::int64_t>(width));
}

std::span<float> BoundCall::run(const RowFactors& factors, const std::stop_token& stop) {
  std::ranges::copy(factors.factor_ids, factor_ids_.begin());
  bind_factors(factors.sets);
  run_session(graph_.session, stop, input_names_, inputs_, output_names_, outputs_);
  return output_;
}

template <class T>
void BoundCall::bind_input(const char* name, std::span<T> values, std::initializer_list<std::int64_t> shape) {
  input_names_.push_back(name);
  inputs_.push_back(tensor_over<T>(values, shape));
}

void BoundCall::bind_factors(const FactorSets& sets) {
  const auto same_memory = [](const auto& ours, const auto& theirs) {
    return ours.second.data() == theirs.second.data();
  };
  if (sets.count == sets_.count && sets.rank == sets_.rank && sets.updates_nothing == sets_.updates_nothing &&
      std::ranges::equal(sets.tensors, sets_.tensors, same_memory)) {
    return;
  }
  auto bound = inputs_.end() - static_cast<std::ptrdiff_t>(graph_.factors.size() + (graph_.has_columns ? 1 : 0));
  const std::int64_t columns = sets.count * sets.rank;
  for (const auto& [name, values] : sets.tensors) {
    *bound++ = in_head(name) ? factor_tensor(sets, values)
                             : tensor_over(values, {columns, static_cast<std::int64_t>(values.size()) / columns});
  }
  if (graph_.has_columns) {
    column_ids_.resize(static_cast<std::size_t>(columns));
    for (std::int64_t column = 0; column < columns; ++column) {
      column_ids_[static_cast<std::size_t>(column)] = sets.updates_nothing ? -1 : column / sets.rank;
    }
    *bound = tensor_over<std::int64_t>(column_ids_, {columns});
  }
  sets_ = sets;
}

}  // namespace chameleon
