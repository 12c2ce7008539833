// Speculative decoding by prompt lookup: the same tokens as plain decoding, in fewer calls.

#include "decode/prompt_lookup.h"

#include <gtest/gtest.h>

#include "shared_data.h"

namespace chameleon::test {

namespace {

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"));
  return runtime;
}

const std::vector<TokenIds> kRepeating = {{7, 8, 9, 10, 7, 8, 9, 10, 7, 8}};

TokenIds tokens_of(const std::vector<TokenIds>& prompts, const Sampling& sampling, std::int64_t draft_tokens,
                   const OnToken& on_token = {}) {
  GenerateOptions options{{.mode = Mode::centroid}};
  options.max_new_tokens = 36;
  options.sampling = sampling;
  options.prompt_lookup_num_tokens = draft_tokens;
  options.on_token = on_token;
  return runtime().generate(prompts, options)[0].token_ids;
}

}  // namespace

TEST(PromptLookup, DraftsWhatFollowedTheLongestSuffixLast) {
  PromptLookup lookup(TokenIds{1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3});
  const auto drafted = [&](std::size_t limit) {
    const auto draft = lookup.draft(limit);
    return TokenIds(draft.begin(), draft.end());
  };
  EXPECT_EQ(drafted(2), (TokenIds{4, 9}));  // after 1 2 3, though 2 3 came later elsewhere
  lookup.append(9);
  lookup.append(2);
  EXPECT_EQ(drafted(2), (TokenIds{3, 5}));  // after 9 2
  lookup.append(7);
  EXPECT_TRUE(drafted(3).empty());
  EXPECT_TRUE(PromptLookup(TokenIds{1}).draft(3).empty());
}

TEST(PromptLookup, TokensEqualThoseOfPlainDecoding) {
  for (const double temperature : {0.0, 0.4, 1.5}) {
    const Sampling sampling{.temperature = temperature, .seed = 5};
    for (const std::int64_t draft_tokens : {1, 4, 16}) {
      EXPECT_EQ(tokens_of(kRepeating, sampling, draft_tokens), tokens_of(kRepeating, sampling, 0));
    }
  }
}

TEST(PromptLookup, CanBeCancelled) {
  std::size_t seen = 0;
  const TokenIds ids = tokens_of(kRepeating, {}, 8, [&](const Token&) { return ++seen < 5; });
  EXPECT_EQ(ids.size(), 5U);
}

TEST(PromptLookup, ArgumentsAreChecked) {
  EXPECT_THROW(tokens_of(kRepeating, {}, 17), InputError);
  EXPECT_THROW(tokens_of(kRepeating, {}, -1), InputError);
  EXPECT_THROW(tokens_of({{1, 2}, {3}}, {}, 4), InputError);
}

}  // namespace chameleon::test
