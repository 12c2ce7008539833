#include "decode/slots.h"

#include <algorithm>
#include <new>
#include <numeric>

#include "chameleon/error.h"

namespace chameleon {

Slots::Slots(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity) try
    : graph_(graph),
      spare_(spare),
      memory_(std::make_unique_for_overwrite<std::byte[]>(graph.cache_bytes(rows, capacity))),
      cache_{memory_.get(), rows, capacity} {
  lengths_.resize(rows);
  logits_.resize(rows * static_cast<std::size_t>(graph.model.vocab_size));
} catch (const std::bad_alloc&) {
  throw LengthError("no memory for a cache of " + std::to_string(rows) + " rows of " + std::to_string(capacity) +
                    " tokens: pass less");
}

std::span<float> Slots::logits(std::size_t row) {
  const auto vocab = static_cast<std::size_t>(graph_.model.vocab_size);
  return std::span(logits_).subspan(row * vocab, vocab);
}

std::vector<float> Slots::prefill(std::size_t first, Rows rows, const RowFactors& factors, bool wants_logits) {
  const std::int64_t start = lengths_[first];
  const std::size_t width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  // Where rows begin, ONNX Runtime's work grows with the capacity, and in int8 it writes all of it: they begin in a
  // cache of their own size.
  const bool is_apart = start == 0;
  const SpareMemory::Block block(spare_, is_apart ? graph_.cache_bytes(rows.size(), width) : 0);
  const CacheBuffers apart{block.data(), rows.size(), width};
  BoundCall call(graph_, is_apart ? apart : cache_, is_apart ? 0 : first, rows.size(), width, 1,
                 wants_logits ? BoundCall::Output::logits : BoundCall::Output::hidden_states);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto length = std::ssize(rows[row]);
    const auto at = static_cast<std::ptrdiff_t>(row * width);
    std::ranges::copy(rows[row], call.input_ids.begin() + at);
    std::iota(call.position_ids.begin() + at, call.position_ids.begin() + at + static_cast<std::ptrdiff_t>(width),
              start);
    call.logits_positions[row] = length - 1;
    call.seqlens_k[row] = static_cast<std::int32_t>(start + length - 1);
  }
  call.total_sequence_length = static_cast<std::int32_t>(start + static_cast<std::int64_t>(width));
  const std::span<float> output = call.run(factors);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (is_apart) cache_.copy_row(graph_, apart, row, first + row, rows[row].size());
    lengths_[first + row] += std::ssize(rows[row]);
  }
  return wants_logits ? std::vector(output.begin(), output.end()) : std::vector<float>();
}

void Slots::step(std::span<const std::int64_t> token_ids, const RowFactors& factors) {
  const std::size_t rows = token_ids.size();
  const auto output = std::span(logits_).first(rows * static_cast<std::size_t>(graph_.model.vocab_size));
  BoundCall& call =
      steps_.try_emplace(rows, graph_, cache_, 0, rows, 1, 1, BoundCall::Output::logits, output).first->second;
  const auto lengths = std::span(lengths_).first(rows);
  std::ranges::copy(token_ids, call.input_ids.begin());
  call.append_to(lengths);
  call.run(factors);
  for (std::int64_t& length : lengths) ++length;
}

void Slots::fork(std::size_t source, std::size_t target, std::int64_t length) {
  cache_.copy_row(graph_, cache_, source, target, static_cast<std::size_t>(length));
  lengths_[target] = length;
}

}  // namespace chameleon
