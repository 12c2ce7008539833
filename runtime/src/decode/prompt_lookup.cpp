#include "decode/prompt_lookup.h"

#include <algorithm>

#include "chameleon/error.h"
#include "decode/shared_cache.h"

namespace chameleon {

namespace {

constexpr std::size_t kMatchedTokens[] = {3, 2};  // lengths of the suffix that is looked up, the longest first

}  // namespace

PromptLookup::PromptLookup(std::span<const std::int64_t> prompt) : prompt_(prompt.size()) {
  for (const std::int64_t token_id : prompt) append(token_id);
}

void PromptLookup::extend(std::span<const std::int64_t> generated) {
  for (const std::int64_t token_id : generated.subspan(token_ids_.size() - prompt_)) append(token_id);
}

void PromptLookup::append(std::int64_t token_id) {
  // The n-grams that end at the previous token now have a token that follows them.
  for (const std::size_t length : kMatchedTokens) {
    if (token_ids_.size() >= length) follows_[suffix(length)] = token_ids_.size();
  }
  token_ids_.push_back(token_id);
}

std::vector<std::int64_t> PromptLookup::draft(std::size_t limit) const {
  for (const std::size_t length : kMatchedTokens) {
    if (token_ids_.size() < length) continue;
    if (const auto found = follows_.find(suffix(length)); found != follows_.end()) {
      const auto following = std::span(token_ids_).subspan(found->second);
      return {following.begin(), following.begin() + static_cast<std::ptrdiff_t>(std::min(limit, following.size()))};
    }
  }
  return {};
}

std::vector<std::int64_t> PromptLookup::suffix(std::size_t length) const {
  return {token_ids_.end() - static_cast<std::ptrdiff_t>(length), token_ids_.end()};
}

void check_drafts(std::int64_t draft_tokens, const Decoder& decoder) {
  if (draft_tokens == 0) return;
  const auto* shared = dynamic_cast<const SharedCacheDecoder*>(&decoder);
  if (shared == nullptr) {
    throw ProviderError("prompt_lookup_num_tokens works on provider 'cpu' only: leave it out");
  }
  if (!shared->is_exact()) {
    throw InputError(
        "prompt_lookup_num_tokens: in int8 a call of several tokens rounds otherwise than calls of one, so tokens "
        "would "
        "differ: leave it out");
  }
}

}  // namespace chameleon
