#include "decode/shared_cache.h"

#include <algorithm>

#include "decode/schedule.h"
#include "factors.h"

namespace chameleon {

namespace {

// Rows times width of one call that reads prompts. Larger calls read the weights less often, but their attention
// scores, this times the row's capacity in each head, leave the processor's cache, and have to be held. It is smaller
// in int8, whose activations then fit into the processor's cache.
constexpr std::size_t kPrefillTokens = 512, kInt8Tokens = 256;

// The same for calls that return hidden states or logits of all positions.
constexpr std::size_t kScoredTokens = 256;

constexpr auto kSize = &std::span<const std::int64_t>::size;

}  // namespace

SharedCacheDecoder::SharedCacheDecoder(Ort::Session session, TiledScorer scorer, const Manifest& manifest)
    : graph_(std::move(session), manifest), scorer_(std::move(scorer)) {}

void SharedCacheDecoder::all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                                    const std::stop_token& stop) const {
  read(rows, factors, BoundCall::Output::logits, stop, [&](Rows piece, std::size_t start, const BoundCall& call) {
    const std::size_t positions = call.logits_positions.size() / piece.size();
    take(start, Logits(call.output().data(), positions, static_cast<std::size_t>(graph_.model.vocab_size)));
  });
}

std::vector<std::vector<float>> SharedCacheDecoder::token_logprobs(Rows rows, const RowFactors& factors,
                                                                   const std::stop_token& stop) const {
  TiledScorer::Batch batch(scorer_, rows, factors, stop);
  const std::vector inputs = without_last(rows);
  const auto hidden_size = static_cast<std::size_t>(graph_.model.hidden_size);
  constexpr std::size_t kAnyRows = std::numeric_limits<std::size_t>::max();
  for (const Part& part : parts(inputs, kScoredTokens, kAnyRows, factors.starts)) {
    const auto take = [&](Rows piece, std::size_t, const BoundCall& call) {
      const std::size_t width = call.logits_positions.size() / piece.size();
      for (std::size_t row = 0; row < piece.size(); ++row) {
        batch.add(part.first + row, call.output().subspan(row * width * hidden_size, piece[row].size() * hidden_size));
      }
    };
    read(Rows(inputs).subspan(part.first, part.count), factors.rows(part.indices()), BoundCall::Output::hidden_states,
         stop, take);
  }
  return batch.finish();
}

std::unique_ptr<Slots> SharedCacheDecoder::slots(std::size_t rows, std::size_t capacity, std::stop_token stop) const {
  return std::make_unique<Slots>(graph_, spare_, rows, capacity, std::move(stop));
}

std::unique_ptr<PrefixCache> SharedCacheDecoder::prefix_cache(const std::string& bundle_digest,
                                                              std::size_t max_bytes) const {
  return std::make_unique<PrefixCache>(graph_, bundle_digest, max_bytes);
}

std::size_t SharedCacheDecoder::prefill_tokens() const { return is_exact() ? kPrefillTokens : kInt8Tokens; }

void SharedCacheDecoder::read(
    Rows rows, const RowFactors& factors, BoundCall::Output output, const std::stop_token& stop,
    const std::function<void(Rows piece, std::size_t start, const BoundCall& call)>& take) const {
  const KeyValues cache(graph_, spare_, rows.size(), std::ranges::max(rows, {}, kSize).size());
  const auto read_piece = [&](Rows piece, std::size_t start, const RowFactors& own) {
    const std::size_t width = std::ranges::max(piece, {}, kSize).size();
    BoundCall call(graph_, cache.buffers(), 0, piece.size(), width, width, output);
    call.append(piece, std::vector(piece.size(), static_cast<std::int64_t>(start)));
    call.run(own, stop);
    take(piece, start, call);
  };
  if (rows.size() > 1) return read_piece(rows, 0, factors);
  // GroupQueryAttention appends several tokens to a cache that is not empty for a single row only.
  const auto first_updated = factors.starts.empty() ? 0 : static_cast<std::size_t>(factors.starts[0]);
  const RowFactors before = first_updated > 0 ? RowFactors{zero_set(factors.sets), {0}} : RowFactors();
  for (std::size_t start = 0; start < rows[0].size();) {
    const bool is_updated = start >= first_updated;
    const std::size_t end = is_updated ? rows[0].size() : std::min(first_updated, rows[0].size());
    const auto piece = rows[0].subspan(start, chunk_length(end - start, kScoredTokens));
    read_piece(Rows(&piece, 1), start, is_updated ? factors : before);
    start += piece.size();
  }
}

}  // namespace chameleon
