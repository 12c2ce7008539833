#include "generation.h"

#include <algorithm>
#include <numeric>

#include "sampling.h"
#include "utf8.h"

namespace chameleon {

std::string_view to_string(FinishReason reason) {
  return reason == FinishReason::stop ? "stop" : reason == FinishReason::length ? "length" : "cancelled";
}

Row::Row(std::span<const std::int64_t> prompt, std::int64_t limit, const Sampling& sampling, std::uint64_t stream,
         std::int64_t cluster_id)
    : prompt_(prompt), limit_(static_cast<std::size_t>(limit)), sampling_(sampling), stream_(stream) {
  generation_.cluster_id = cluster_id;
  if (sampling.repetition_penalty == 1.0) return;
  seen_.assign(prompt.begin(), prompt.end());
  std::ranges::sort(seen_);
  seen_.erase(std::ranges::unique(seen_).begin(), seen_.end());
}

std::int64_t Row::choose(std::span<float> logits) {
  const double u = uniform(sampling_.seed, stream_, generation_.token_ids.size());
  const std::int64_t token_id = chameleon::choose(logits, seen_, sampling_, u);
  if (sampling_.repetition_penalty != 1.0) {
    const auto place = std::ranges::lower_bound(seen_, token_id);
    if (place == seen_.end() || *place != token_id) seen_.insert(place, token_id);
  }
  return token_id;
}

bool Row::append(std::int64_t token_id, const Tokenizer& tokenizer, std::int64_t eos_token_id) {
  auto& [token_ids, text, cluster_id, reason] = generation_;
  token_ids.push_back(token_id);
  bool stopped = token_id == eos_token_id ||
                 std::ranges::find(sampling_.stop_token_ids, token_id) != sampling_.stop_token_ids.end();
  if (stopped) {
    text = tokenizer.decode(std::span(token_ids).first(token_ids.size() - 1));
  } else {
    pending_ += tokenizer.bytes(token_id);
    if (const std::string decoded = replace_invalid_utf8(pending_); !decoded.ends_with(kReplacement)) {
      text += decoded;
      pending_.clear();
    }
    std::size_t cut = std::string::npos;
    for (const std::string& stop : sampling_.stop) cut = std::min(cut, text.find(stop));
    if (cut != std::string::npos) {
      stopped = true;
      text.resize(cut);
    }
  }
  finished_ = stopped || token_ids.size() >= limit_;
  if (finished_ && !stopped) text = tokenizer.decode(token_ids);  // with the bytes of a character cut in half
  reason = stopped ? FinishReason::stop : FinishReason::length;
  return finished_;
}

std::string_view Row::take_text() {
  const std::size_t end = generation_.text.size() - (finished_ ? 0 : held_back());
  const std::string_view text = std::string_view(generation_.text).substr(shown_, end - shown_);
  shown_ = end;
  return text;
}

void Row::cancel() { generation_.finish_reason = FinishReason::cancelled; }

/// How many bytes at the end may be the beginning of a stop string.
std::size_t Row::held_back() const {
  std::size_t longest = 0;
  for (const std::string& stop : sampling_.stop) {
    for (std::size_t length = stop.size() - 1; length > longest; --length) {
      if (generation_.text.ends_with(std::string_view(stop).substr(0, length))) longest = length;
    }
  }
  return longest;
}

void stream_tokens(std::span<Row> rows, const Decoder& decoder, const Adaptation& adaptation,
                   const Tokenizer& tokenizer, std::int64_t eos_token_id, const OnToken& on_token,
                   const std::stop_token& stop) {
  std::vector<std::size_t> active(rows.size());  // rows by their place in the cache
  std::iota(active.begin(), active.end(), 0);
  RowFactors factors = adaptation.factors;
  std::vector<std::span<const std::int64_t>> prompts;
  for (const Row& row : rows) prompts.push_back(row.prompt());
  try {
    std::size_t capacity = 0;
    for (const Row& row : rows) capacity = std::max(capacity, row.capacity());
    auto [logits, cache] = decoder.prefill(prompts, factors, capacity, stop);
    while (!stop.stop_requested()) {
      std::vector<std::size_t> going;
      std::vector<std::int64_t> chosen;
      for (std::size_t i = 0; i < active.size(); ++i) {
        Row& row = rows[active[i]];
        const std::int64_t token_id = row.choose(logits.at(i));
        const bool finished = row.append(token_id, tokenizer, eos_token_id);
        const Token token{active[i], token_id, row.take_text(), finished ? &row.generation() : nullptr};
        const bool wanted = !on_token || on_token(token);
        if (finished) continue;
        if (wanted) {
          going.push_back(i);
          chosen.push_back(token_id);
        } else {
          row.cancel();
        }
      }
      if (going.empty()) return;
      if (going.size() < active.size()) {
        decoder.keep(*cache, going);
        factors = factors.rows(going);
        for (std::size_t i = 0; i < going.size(); ++i) active[i] = active[going[i]];
        active.resize(going.size());
      }
      logits = decoder.step(chosen, factors, *cache, stop);
    }
  } catch (const GraphError&) {
    if (!stop.stop_requested()) throw;  // else it is how ONNX Runtime reports that it was told to stop
  }
  for (const std::size_t row : active) rows[row].cancel();
}

}  // namespace chameleon
