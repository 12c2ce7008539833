// Speculative decoding by prompt lookup: the same tokens as plain decoding, in fewer calls.

#include "decode/prompt_lookup.h"

#include <gtest/gtest.h>

#include "shared_data.h"

namespace chameleon::test::prompt_lookup_test {

namespace {

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"));
  return runtime;
}

const std::vector<TokenIds> kRepeating = {{7, 8, 9, 10, 7, 8, 9, 10, 7, 8}};

Generate drafting(std::int64_t draft_tokens, const Sampling& sampling = {}) {
  return {.max_new_tokens = 36, .sampling = sampling, .prompt_lookup_num_tokens = draft_tokens};
}

}  // namespace

TEST(PromptLookup, DraftsWhatFollowedTheLongestSuffixLast) {
  PromptLookup lookup(TokenIds{1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3});
  EXPECT_EQ(lookup.draft(2), (TokenIds{4, 9}));  // after 1 2 3, though 2 3 came later elsewhere
  lookup.extend(TokenIds{9, 2});
  EXPECT_EQ(lookup.draft(2), (TokenIds{3, 5}));  // after 9 2
  lookup.extend(TokenIds{9, 2, 7});
  EXPECT_TRUE(lookup.draft(3).empty());
  EXPECT_TRUE(PromptLookup(TokenIds{1}).draft(3).empty());
}

TEST(PromptLookup, TokensEqualThoseOfPlainDecoding) {
  for (const double temperature : {0.0, 0.4, 1.5}) {
    const Sampling sampling{.temperature = temperature, .seed = 5};
    const auto expected = runtime().generate(kRepeating, drafting(0, sampling), {.mode = Mode::centroid});
    for (const std::int64_t draft_tokens : {1, 4, 16}) {
      const auto found = runtime().generate(kRepeating, drafting(draft_tokens, sampling), {.mode = Mode::centroid});
      EXPECT_EQ(found[0].token_ids, expected[0].token_ids);
    }
  }
}

TEST(PromptLookup, TheLastOfSeveralRowsDrafts) {
  const std::vector<TokenIds> prompts = {{1, 2}, kRepeating[0], {3}};
  Generate generate{.max_new_tokens = std::vector<std::int64_t>{3, 36, 5}};
  const auto expected = runtime().generate(prompts, generate);
  generate.prompt_lookup_num_tokens = 8;
  const auto found = runtime().generate(prompts, generate);
  for (std::size_t row = 0; row < prompts.size(); ++row) EXPECT_EQ(found[row].token_ids, expected[row].token_ids);
}

TEST(PromptLookup, CanBeCancelled) {
  std::size_t seen = 0;
  const auto on_token = [&](const Token&) { return ++seen < 5; };
  const Generation row = runtime().stream(kRepeating, on_token, drafting(8), {.mode = Mode::centroid})[0];
  EXPECT_EQ(row.finish_reason, FinishReason::cancelled);
  EXPECT_GE(row.token_ids.size(), 5U);  // and those of the same call
  EXPECT_LE(row.token_ids.size(), 5U + 8U);
}

}  // namespace chameleon::test::prompt_lookup_test
