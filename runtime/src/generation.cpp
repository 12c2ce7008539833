#include "generation.h"

#include <algorithm>
#include <array>

#include "chameleon/error.h"
#include "per_prompt.h"

namespace chameleon {

std::string_view to_string(FinishReason reason) {
  constexpr std::array<std::string_view, 5> names = {"stop", "length", "cancelled", "deadline", "error"};
  return names.at(static_cast<std::size_t>(reason));
}

namespace {

constexpr std::size_t kMaxContinuations = 65536;
constexpr std::int64_t kMaxDraftTokens = 16;  // of one call; logits of each take vocab * 4 bytes

/// Throws InputError for an argument that is not an integer from `least` to `most`.
template <class T>
void check_integer(const char* name, T value, T least, T most) {
  if (value >= least && value <= most) return;
  throw InputError(std::string(name) + " must be an integer from " + std::to_string(least) + " to " +
                   std::to_string(most) + ", got " + std::to_string(value));
}

}  // namespace

Row::Row(std::size_t index, std::span<const std::int64_t> prompt, std::int64_t limit, const Sampling& sampling,
         std::uint64_t stream, std::int64_t cluster_id)
    : index_(index),
      prompt_(prompt),
      limit_(static_cast<std::size_t>(limit)),
      sampler_(sampling, prompt, stream),
      begun_(sampling.stop.size()) {
  generation_.cluster_id = cluster_id;
}

Choice Row::choose(std::span<const float> logits) const {
  const AllowedTokens& allowed_tokens = sampler_.sampling().allowed_tokens;
  if (!allowed_tokens) return sampler_.choose(logits);
  const std::span<const bool> allowed = allowed_tokens(token_ids());
  if (allowed.size() != logits.size()) {
    throw InputError("allowed_tokens gave " + std::to_string(allowed.size()) + " flags for a vocabulary of " +
                     std::to_string(logits.size()) + " tokens");
  }
  return sampler_.choose(logits, allowed);
}

Token Row::append(Choice choice, const Tokenizer& tokenizer, std::int64_t eos_token_id) {
  const std::int64_t token_id = choice.token_id;
  auto& [token_ids, text, cluster_id, reason, token_logprobs, top_logprobs, error] = generation_;
  sampler_.append(token_id);
  token_ids.push_back(token_id);
  if (choice.logprob) {
    token_logprobs.push_back(*choice.logprob);
    top_logprobs.push_back(choice.top_logprobs);
  }
  bool stopped = is_stop_token(token_id, eos_token_id);
  bool finished = stopped || token_ids.size() >= limit_;
  if (finished) {  // with the bytes of a character cut in half
    text = tokenizer.decode(std::span(token_ids).first(token_ids.size() - (stopped ? 1 : 0)));
  } else {
    text += stream_.step(tokenizer, token_id);
  }
  std::size_t cut = std::string::npos;
  const auto& stops = sampler_.sampling().stop;
  for (std::size_t i = 0; i < stops.size(); ++i) cut = std::min(cut, text.find(stops[i], begun_[i]));
  if (cut != std::string::npos) {
    stopped = finished = true;
    text.resize(cut);
  }
  Token token{index_, token_id, take_text(finished), nullptr, choice.logprob, std::move(choice.top_logprobs)};
  if (finished) {
    reason = stopped ? FinishReason::stop : FinishReason::length;
    token.generation = std::make_shared<const Generation>(generation_);
  }
  return token;
}

Token Row::end(FinishReason reason, std::optional<Error> error) {
  generation_.finish_reason = reason;
  generation_.error = std::move(error);
  return {index_, -1, take_text(true), std::make_shared<const Generation>(generation_)};
}

bool Row::is_stop_token(std::int64_t token_id, std::int64_t eos_token_id) const {
  const Sampling& sampling = sampler_.sampling();
  return (token_id == eos_token_id && (!sampling.ignore_eos || sampling.allowed_tokens)) ||
         sampler_.is_stop_token(token_id);
}

std::string Row::take_text(bool finished) {
  const std::string& text = generation_.text;
  const std::size_t begin = std::min(shown_, text.size());  // a decoder may make less of all tokens than of some
  shown_ = text.size() - (finished ? 0 : held_back());
  return text.substr(begin, shown_ - begin);
}

/// How many bytes at the end may be the beginning of a stop string.
std::size_t Row::held_back() {
  const std::string_view text = generation_.text;
  const auto& stops = sampler_.sampling().stop;
  std::size_t first = text.size();
  for (std::size_t i = 0; i < stops.size(); ++i) {
    // A place that does not begin the string never will, so each is looked at once.
    std::size_t at = std::max(begun_[i], text.size() - std::min(text.size(), stops[i].size() - 1));
    while ((at = text.find(stops[i].front(), at)) < text.size() && !stops[i].starts_with(text.substr(at))) ++at;
    begun_[i] = std::min(at, text.size());
    first = std::min(first, begun_[i]);
  }
  return text.size() - first;
}

void check(const Generate& generate) {
  check_integer<std::size_t>("n", generate.n, 1, kMaxContinuations);
  if (generate.deadline && !(*generate.deadline > Seconds::zero())) {  // false for NaN
    throw InputError("deadline must be a number of seconds above 0");
  }
  check_integer<std::int64_t>("prompt_lookup_num_tokens", generate.prompt_lookup_num_tokens, 0, kMaxDraftTokens);
}

std::vector<Row> begin_rows(std::span<const TokenIds> prompts, std::span<const std::int64_t> cluster_ids,
                            const Generate& generate, std::size_t capacity, std::int64_t vocab_size) {
  const auto& max_new_tokens = generate.max_new_tokens;
  const auto& sampling = generate.sampling;
  const std::size_t n = generate.n;
  check_count(max_new_tokens, prompts.size(), "max_new_tokens");
  check_count(sampling, prompts.size(), "sampling");
  const bool single = std::holds_alternative<Sampling>(sampling);
  std::vector<Row> rows;
  rows.reserve(prompts.size() * n);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    check(value_of(sampling, i), vocab_size);
    const std::int64_t limit = value_of(max_new_tokens, i);
    if (limit < 1) throw InputError("max_new_tokens must be at least 1, got " + std::to_string(limit));
    // The last new token is never fed back, so it needs no position.
    const std::int64_t room = static_cast<std::int64_t>(capacity) - std::ssize(prompts[i]) + 1;
    for (std::size_t k = 0; k < n; ++k) {
      rows.emplace_back(i * n + k, prompts[i], std::min(limit, room), value_of(sampling, i), (single ? i * n : 0) + k,
                        cluster_ids[i]);
    }
  }
  return rows;
}

}  // namespace chameleon
