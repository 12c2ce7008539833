#include "slots.h"

#include <algorithm>
#include <new>
#include <numeric>

#include "chameleon/error.h"

namespace chameleon {

Slots::Slots(const SharedCacheGraph& graph, std::size_t rows, std::size_t capacity) try
    : graph_(graph),
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

std::vector<float> Slots::prefill(std::size_t row, std::span<const std::int64_t> token_ids, const RowFactors& factors,
                                  bool wants_logits) {
  const std::int64_t start = lengths_[row], width = std::ssize(token_ids);
  BoundCall call(graph_, cache_, row, 1, token_ids.size(), 1,
                 wants_logits ? BoundCall::Output::logits : BoundCall::Output::hidden_states);
  std::ranges::copy(token_ids, call.input_ids.begin());
  std::iota(call.position_ids.begin(), call.position_ids.end(), start);
  call.logits_positions[0] = width - 1;
  call.seqlens_k[0] = static_cast<std::int32_t>(start + width - 1);
  call.total_sequence_length = static_cast<std::int32_t>(start + width);
  const std::span<float> output = call.run(factors);
  lengths_[row] += width;
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
  cache_.copy_row(graph_, source, target, static_cast<std::size_t>(length));
  lengths_[target] = length;
}

}  // namespace chameleon
