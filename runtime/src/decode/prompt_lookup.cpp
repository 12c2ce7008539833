#include "decode/prompt_lookup.h"

#include <algorithm>

#include "chameleon/error.h"

namespace chameleon {

namespace {

constexpr std::int64_t kMaxDraftTokens = 16;      // of one call; logits of each take vocab * 4 bytes
constexpr std::size_t kMatchedTokens[] = {3, 2};  // lengths of the suffix that is looked up, the longest first

}  // namespace

PromptLookup::PromptLookup(std::span<const std::int64_t> token_ids) {
  for (const std::int64_t token_id : token_ids) append(token_id);
}

void PromptLookup::append(std::int64_t token_id) {
  // The n-grams that end at the previous token now have a token that follows them.
  for (const std::size_t length : kMatchedTokens) {
    if (token_ids_.size() >= length) follows_[suffix(length)] = token_ids_.size();
  }
  token_ids_.push_back(token_id);
}

std::span<const std::int64_t> PromptLookup::draft(std::size_t limit) const {
  for (const std::size_t length : kMatchedTokens) {
    if (token_ids_.size() < length) continue;
    if (const auto found = follows_.find(suffix(length)); found != follows_.end()) {
      const auto following = std::span(token_ids_).subspan(found->second);
      return following.first(std::min(limit, following.size()));
    }
  }
  return {};
}

std::vector<std::int64_t> PromptLookup::suffix(std::size_t length) const {
  return {token_ids_.end() - static_cast<std::ptrdiff_t>(length), token_ids_.end()};
}

std::vector<Generation> generate_speculated(std::vector<Row> rows, std::int64_t draft_tokens, const Decoder& decoder,
                                            const RowFactors& factors, const Tokenizer& tokenizer,
                                            std::int64_t eos_token_id, OnError errors, const OnToken& on_token,
                                            const std::stop_token& stop) {
  if (draft_tokens < 1 || draft_tokens > kMaxDraftTokens) {
    throw InputError("prompt_lookup_num_tokens must be from 0 (off) to " + std::to_string(kMaxDraftTokens) + ", got " +
                     std::to_string(draft_tokens));
  }
  if (rows.size() > 1) {
    throw InputError("prompt_lookup_num_tokens is for a single prompt, got " + std::to_string(rows.size()) +
                     ": pass one, or leave it out");
  }
  Row& row = rows.front();
  PromptLookup lookup(row.prompt());
  const std::span<const std::int64_t> prompt = row.prompt();
  try {
    auto [logits, cache] = decoder.prefill(Rows(&prompt, 1), factors, row.capacity(), stop);
    std::vector<std::int64_t> read = {prompt.back()};  // the last token that was certain, then the draft
    while (!stop.stop_requested()) {
      for (std::size_t i = 0; i < read.size(); ++i) {
        const Token token = append_choice(row, logits.at(0, i), tokenizer, eos_token_id, errors);
        const bool wanted = !on_token || on_token(token);
        if (token.generation != nullptr) return {*token.generation};
        if (!wanted) return {*row.end(FinishReason::cancelled).generation};
        lookup.append(token.token_id);
        if (i + 1 < read.size() && token.token_id != read[i + 1]) break;
      }
      const std::size_t past = prompt.size() + row.token_ids().size() - 1;
      read = {row.last_token_id()};
      // The last new token is never read, so a draft ends before it.
      const std::size_t room = row.capacity() - past - 1;
      std::ranges::copy(lookup.draft(std::min(static_cast<std::size_t>(draft_tokens), room)), std::back_inserter(read));
      logits = decoder.extend(read, past, factors, *cache, stop);
    }
  } catch (const GraphError&) {
    if (!stop.stop_requested()) throw;  // else it is how ONNX Runtime reports that it was told to stop
  }
  return {*row.end(FinishReason::cancelled).generation};
}

}  // namespace chameleon
