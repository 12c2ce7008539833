#include "decode/slots.h"

#include <algorithm>
#include <new>
#include <optional>
#include <utility>

#include "chameleon/error.h"

namespace chameleon {

namespace {

constexpr std::size_t kMostlyFilled = 2;  // times its prompt that a row may hold for the prompt to be written in place

LengthError no_memory(std::size_t rows, std::size_t capacity) {
  return LengthError("no memory for a cache of " + std::to_string(rows) + " rows of " + std::to_string(capacity) +
                     " tokens: pass fewer rows or a smaller max_new_tokens");
}

}  // namespace

KeyValues::KeyValues(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity) try
    : spare_(spare) {
  const std::size_t size = graph.cache_bytes(rows, capacity);
  {
    const std::lock_guard lock(spare.mutex);
    bytes_ = std::move(spare.bytes);
    size_ = std::exchange(spare.size, 0);
  }
  if (size_ < size) {
    bytes_.reset();  // first, so that there are never both
    bytes_ = std::make_unique_for_overwrite<std::byte[]>(size);
    size_ = size;
  }
  buffers_ = {bytes_.get(), rows, capacity};
} catch (const std::bad_alloc&) {
  throw no_memory(rows, capacity);
}

KeyValues::~KeyValues() {
  const std::lock_guard lock(spare_.mutex);
  spare_.bytes = std::move(bytes_);
  spare_.size = size_;
}

Slots::Slots(const SharedCacheGraph& graph, SpareMemory& spare, std::size_t rows, std::size_t capacity,
             std::stop_token stop) try
    : graph_(graph),
      spare_(spare),
      stop_(std::move(stop)),
      memory_(graph, spare, rows, capacity),
      lengths_(rows),
      logits_(rows * vocab()) {
} catch (const std::bad_alloc&) {
  throw no_memory(rows, capacity);
}

Logits Slots::logits() { return {logits_.data(), 1, vocab()}; }

std::vector<float> Slots::prefill(std::size_t first, Rows rows, const RowFactors& factors, bool wants_logits) {
  const std::size_t width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  const auto lengths = std::span(lengths_).subspan(first, rows.size());
  // Where rows begin, ONNX Runtime's work grows with the capacity, and in int8 it writes all of it: unless most of it
  // is filled, they begin in a cache of their own size.
  std::optional<KeyValues> apart;
  if (lengths[0] == 0 && cache_.capacity > kMostlyFilled * width) apart.emplace(graph_, spare_, rows.size(), width);
  BoundCall call(graph_, apart ? apart->buffers() : cache_, apart ? 0 : first, rows.size(), width, 1,
                 wants_logits ? BoundCall::Output::logits : BoundCall::Output::hidden_states);
  call.append(rows, lengths);
  const std::span<float> output = call.run(factors, stop_);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (apart) cache_.copy_row(graph_, apart->buffers(), row, first + row, rows[row].size());
    lengths[row] += std::ssize(rows[row]);
  }
  return wants_logits ? std::vector(output.begin(), output.end()) : std::vector<float>();
}

void Slots::step(std::span<const std::int64_t> token_ids, const RowFactors& factors) {
  const std::size_t rows = token_ids.size();
  const auto output = std::span(logits_).first(rows * vocab());
  BoundCall& call =
      steps_.try_emplace(rows, graph_, cache_, 0, rows, 1, 1, BoundCall::Output::logits, output).first->second;
  std::vector<std::span<const std::int64_t>> single;
  for (std::size_t row = 0; row < rows; ++row) single.push_back(token_ids.subspan(row, 1));
  const auto lengths = std::span(lengths_).first(rows);
  call.append(single, lengths);
  call.run(factors, stop_);
  for (std::int64_t& length : lengths) ++length;
}

Logits Slots::draft(std::size_t row, std::span<const std::int64_t> token_ids, const RowFactors& factors) {
  const std::size_t width = token_ids.size();
  BoundCall& call =
      drafts_.try_emplace(std::pair(row, width), graph_, cache_, row, 1, width, width, BoundCall::Output::logits)
          .first->second;
  call.append(Rows(&token_ids, 1), std::span(lengths_).subspan(row, 1));
  const std::span<float> output = call.run(factors, stop_);
  lengths_[row] += std::ssize(token_ids);
  return {output.data(), width, vocab()};
}

void Slots::copy_out(std::size_t row, std::size_t start, std::byte* block, std::size_t tokens) const {
  CacheBuffers{block, 1, tokens}.copy_row(graph_, cache_, row, 0, tokens, start);
}

void Slots::copy_in(std::size_t row, const std::byte* block, std::size_t tokens) {
  const CacheBuffers source{const_cast<std::byte*>(block), 1, tokens};  // which is only read
  cache_.copy_row(graph_, source, 0, row, tokens, 0, static_cast<std::size_t>(lengths_[row]));
  lengths_[row] += static_cast<std::int64_t>(tokens);
}

void Slots::swap(std::size_t row, std::size_t other) {
  const auto length = static_cast<std::size_t>(lengths_[row]);
  std::optional<KeyValues> kept;
  if (length > 0) {
    kept.emplace(graph_, spare_, 1, length);
    kept->buffers().copy_row(graph_, cache_, row, 0, length);
  }
  move(other, row);
  if (kept) cache_.copy_row(graph_, kept->buffers(), 0, other, length);
  lengths_[other] = static_cast<std::int64_t>(length);
}

void Slots::fork(std::size_t source, std::size_t target, std::int64_t length) {
  cache_.copy_row(graph_, cache_, source, target, static_cast<std::size_t>(length));
  lengths_[target] = length;
}

}  // namespace chameleon
