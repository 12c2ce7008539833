#include "generation.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "utf8.h"

namespace chameleon {

std::string_view to_string(FinishReason reason) {
  constexpr std::array<std::string_view, 5> names = {"stop", "length", "cancelled", "deadline", "error"};
  return names.at(static_cast<std::size_t>(reason));
}

Row::Row(std::span<const std::int64_t> prompt, std::int64_t limit, const Sampling& sampling, std::uint64_t stream,
         std::int64_t cluster_id)
    : prompt_(prompt),
      limit_(static_cast<std::size_t>(limit)),
      sampling_(sampling),
      sampler_(sampling, prompt, stream) {
  generation_.cluster_id = cluster_id;
}

bool Row::append(const Choice& choice, const Tokenizer& tokenizer, std::int64_t eos_token_id) {
  const std::int64_t token_id = choice.token_id;
  auto& [token_ids, text, cluster_id, reason, token_logprobs, top_logprobs, error] = generation_;
  sampler_.append(token_id);
  token_ids.push_back(token_id);
  if (choice.logprob) {
    token_logprobs.push_back(*choice.logprob);
    top_logprobs.push_back(choice.top_logprobs);
  }
  bool stopped = is_stop_token(token_id, eos_token_id);
  finished_ = stopped || token_ids.size() >= limit_;
  if (finished_) {  // with the bytes of a character cut in half
    text = tokenizer.decode(std::span(token_ids).first(token_ids.size() - (stopped ? 1 : 0)));
  } else {
    pending_ += tokenizer.bytes(token_id);
    if (const std::string decoded = replace_invalid_utf8(pending_); !decoded.ends_with(kReplacement)) {
      text += decoded;
      pending_.clear();
    }
  }
  std::size_t cut = std::string::npos;
  for (const std::string& stop : sampling_.stop) cut = std::min(cut, text.find(stop));
  if (cut != std::string::npos) {
    stopped = finished_ = true;
    text.resize(cut);
  }
  reason = stopped ? FinishReason::stop : FinishReason::length;
  return finished_;
}

bool Row::is_stop_token(std::int64_t token_id, std::int64_t eos_token_id) const {
  const auto& ids = sampling_.stop_token_ids;
  return (token_id == eos_token_id && !sampling_.ignore_eos) || std::ranges::find(ids, token_id) != ids.end();
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
        const Choice choice = row.sampler().choose(logits.at(i));
        const bool finished = row.append(choice, tokenizer, eos_token_id);
        const Token token{active[i],      choice.token_id,    row.take_text(), finished ? &row.generation() : nullptr,
                          choice.logprob, choice.top_logprobs};
        const bool wanted = !on_token || on_token(token);
        if (finished) continue;
        if (wanted) {
          going.push_back(i);
          chosen.push_back(choice.token_id);
        } else {
          row.cancel();
        }
      }
      if (going.empty()) return;
      if (going.size() < active.size()) {
        decoder.select(*cache, going);
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
