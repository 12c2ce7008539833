#include "decode/shared_cache.h"

#include <algorithm>
#include <map>
#include <new>
#include <numeric>

#include "chameleon/error.h"
#include "decode/schedule.h"
#include "decode/slots.h"

namespace chameleon {

namespace {

// Rows times width of one call that reads prompts. It bounds the memory of activations and costs no time at this size.
// It is smaller in int8, whose activations then stay in the processor's cache.
constexpr std::size_t kPrefillTokens = 2048, kInt8Tokens = 256;

// The same for calls that return hidden states or logits of all positions.
constexpr std::size_t kScoredTokens = 256;

constexpr auto kSize = &std::span<const std::int64_t>::size;

/// Call `read` with rows and the position of their first token: several rows whole, a single row in pieces of at most
/// `tokens` tokens. GroupQueryAttention appends several tokens to a cache that is not empty for a single row only.
template <class Read>
void in_pieces(Rows rows, std::size_t tokens, const Read& read) {
  if (rows.size() > 1) return read(rows, 0);
  for (std::size_t start = 0; start < rows[0].size();) {
    const auto piece = rows[0].subspan(start, chunk_length(rows[0].size() - start, tokens));
    read(Rows(&piece, 1), start);
    start += piece.size();
  }
}

}  // namespace

SpareMemory::Block::Block(SpareMemory& spare, std::size_t size) : spare_(spare) {
  {
    const std::lock_guard lock(spare.mutex_);
    bytes_ = std::move(spare.bytes_);
    size_ = std::exchange(spare.size_, 0);
  }
  if (size_ >= size) return;
  bytes_.reset();  // first, so that there are never both
  bytes_ = std::make_unique_for_overwrite<std::byte[]>(size);
  size_ = size;
}

SpareMemory::Block::~Block() {
  if (bytes_ == nullptr) return;
  const std::lock_guard lock(spare_.mutex_);
  spare_.bytes_ = std::move(bytes_);
  spare_.size_ = size_;
}

/// The key-value cache of a batch.
struct SharedCacheDecoder::SharedCache final : Cache {
  SharedCache(SpareMemory::Block block, std::size_t rows, std::size_t capacity)
      : memory(std::move(block)), buffers{memory.data(), rows, capacity}, lengths(rows) {}

  SpareMemory::Block memory;
  CacheBuffers buffers;
  std::vector<std::int64_t> lengths;  // [batch], real tokens per row: the next token's position
  std::unique_ptr<BoundCall> step;    // the bound call of a decoding step, made at the first one of a number of rows
  std::map<std::size_t, std::unique_ptr<BoundCall>> extend;  // the same of calls that append several tokens, by number
};

SharedCacheDecoder::SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest)
    : graph_(std::move(session), manifest),
      scorer_(std::move(scorer)),
      prefill_tokens_(manifest.precision == "int8" ? kInt8Tokens : kPrefillTokens) {}

std::pair<Logits, std::unique_ptr<Cache>> SharedCacheDecoder::prefill(Rows rows, const RowFactors& factors,
                                                                      std::size_t capacity,
                                                                      const std::stop_token& stop) const {
  capacity = std::max(capacity, std::ranges::max(rows, {}, kSize).size());
  auto cache = std::make_unique<SharedCache>(empty_cache(rows.size(), capacity));
  const auto vocab = static_cast<std::size_t>(graph_.model.vocab_size);
  const auto values = std::make_shared<std::vector<float>>(rows.size() * vocab);
  for (const Part& part : parts(rows, prefill_tokens_)) {
    const RowFactors own = factors.rows(part.indices());
    const auto out = values->begin() + static_cast<std::ptrdiff_t>(part.first * vocab);
    in_pieces(rows.subspan(part.first, part.count), prefill_tokens_, [&](Rows piece, std::size_t start) {
      const auto call = read(piece, own, cache->buffers, part.first, start, true, BoundCall::Output::logits, stop);
      std::ranges::copy(call->output(), out);
    });
  }
  std::ranges::transform(rows, cache->lengths.begin(), [](const auto& row) { return std::ssize(row); });
  return {Logits(values->data(), 1, vocab, values), std::move(cache)};
}

Logits SharedCacheDecoder::step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& any_cache,
                                const std::stop_token& stop) const {
  auto& cache = dynamic_cast<SharedCache&>(any_cache);
  if (cache.step == nullptr) {
    cache.step =
        std::make_unique<BoundCall>(graph_, cache.buffers, 0, token_ids.size(), 1, 1, BoundCall::Output::logits);
  }
  BoundCall& call = *cache.step;
  std::ranges::copy(token_ids, call.input_ids.begin());
  call.append_to(cache.lengths);
  const std::span<float> logits = call.run(factors, stop);
  for (std::int64_t& length : cache.lengths) ++length;
  return {logits.data(), 1, static_cast<std::size_t>(graph_.model.vocab_size), nullptr};
}

Logits SharedCacheDecoder::extend(std::span<const std::int64_t> token_ids, std::size_t past, const RowFactors& factors,
                                  Cache& any_cache, const std::stop_token& stop) const {
  auto& cache = dynamic_cast<SharedCache&>(any_cache);
  const std::size_t width = token_ids.size();
  auto& call = cache.extend[width];
  if (call == nullptr) {
    call = std::make_unique<BoundCall>(graph_, cache.buffers, 0, 1, width, width, BoundCall::Output::logits);
    std::iota(call->logits_positions.begin(), call->logits_positions.end(), 0);
  }
  std::ranges::copy(token_ids, call->input_ids.begin());
  std::iota(call->position_ids.begin(), call->position_ids.end(), past);
  call->seqlens_k[0] = static_cast<std::int32_t>(past + width - 1);
  call->total_sequence_length = static_cast<std::int32_t>(past + width);
  const std::span<float> logits = call->run(factors, stop);
  cache.lengths[0] = static_cast<std::int64_t>(past + width);
  return {logits.data(), width, static_cast<std::size_t>(graph_.model.vocab_size), nullptr};
}

void SharedCacheDecoder::select(Cache& any_cache, std::span<const std::size_t> rows) const {
  auto& cache = dynamic_cast<SharedCache&>(any_cache);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i == rows[i]) continue;
    cache.buffers.copy_row(graph_, cache.buffers, rows[i], i, static_cast<std::size_t>(cache.lengths[rows[i]]));
    cache.lengths[i] = cache.lengths[rows[i]];
  }
  cache.lengths.resize(rows.size());
  cache.step.reset();
}

void SharedCacheDecoder::all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                                    const std::stop_token& stop) const {
  const SharedCache cache = empty_cache(rows.size(), std::ranges::max(rows, {}, kSize).size());
  in_pieces(rows, kScoredTokens, [&](Rows piece, std::size_t start) {
    const auto call = read(piece, factors, cache.buffers, 0, start, false, BoundCall::Output::logits, stop);
    const std::size_t positions = call->logits_positions.size() / piece.size();
    take(start, Logits(call->output().data(), positions, static_cast<std::size_t>(graph_.model.vocab_size), nullptr));
  });
}

std::vector<std::vector<float>> SharedCacheDecoder::token_logprobs(Rows rows, const RowFactors& factors,
                                                                   const std::stop_token& stop) const {
  TiledScorer::Batch batch(scorer_, rows, factors, stop);
  const std::vector inputs = without_last(rows);
  const auto hidden_size = static_cast<std::size_t>(graph_.model.hidden_size);
  for (const Part& part : parts(inputs, kScoredTokens)) {
    const Rows members = Rows(inputs).subspan(part.first, part.count);
    const RowFactors own = factors.rows(part.indices());
    const SharedCache cache = empty_cache(part.count, std::ranges::max(members, {}, kSize).size());
    in_pieces(members, kScoredTokens, [&](Rows piece, std::size_t start) {
      const auto call = read(piece, own, cache.buffers, 0, start, false, BoundCall::Output::hidden_states, stop);
      const std::size_t width = call->logits_positions.size() / piece.size();
      for (std::size_t row = 0; row < piece.size(); ++row) {
        batch.add(part.first + row, call->output().subspan(row * width * hidden_size, piece[row].size() * hidden_size));
      }
    });
  }
  return batch.finish();
}

std::unique_ptr<Slots> SharedCacheDecoder::slots(std::size_t rows, std::size_t capacity) const {
  return std::make_unique<Slots>(graph_, spare_, rows, capacity);
}

std::unique_ptr<BoundCall> SharedCacheDecoder::read(Rows rows, const RowFactors& factors, const CacheBuffers& cache,
                                                    std::size_t first, std::size_t start, bool last_only,
                                                    BoundCall::Output output, const std::stop_token& stop) const {
  const std::size_t width = std::ranges::max(rows, {}, kSize).size();
  auto call = std::make_unique<BoundCall>(graph_, cache, first, rows.size(), width, last_only ? 1 : width, output);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto at = static_cast<std::ptrdiff_t>(row * width), end = at + static_cast<std::ptrdiff_t>(width);
    std::ranges::copy(rows[row], call->input_ids.begin() + at);
    std::iota(call->position_ids.begin() + at, call->position_ids.begin() + end, start);
    const auto length = static_cast<std::int64_t>(rows[row].size());
    if (last_only) {
      call->logits_positions[row] = length - 1;
    } else {
      std::iota(call->logits_positions.begin() + at, call->logits_positions.begin() + end, 0);
    }
    call->seqlens_k[row] = static_cast<std::int32_t>(static_cast<std::int64_t>(start) + length - 1);
  }
  call->total_sequence_length = static_cast<std::int32_t>(start + width);
  call->run(factors, stop);
  return call;
}

SharedCacheDecoder::SharedCache SharedCacheDecoder::empty_cache(std::size_t batch, std::size_t capacity) const try {
  return {SpareMemory::Block(spare_, graph_.cache_bytes(batch, capacity)), batch, capacity};
} catch (const std::bad_alloc&) {
  throw LengthError("no memory for a cache of " + std::to_string(batch) + " rows of " + std::to_string(capacity) +
                    " tokens: pass fewer rows or a smaller max_new_tokens");
}

}  // namespace chameleon
