// Bad inputs, cancellation and failures, and their effect on other rows and calls.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>

#include "decode/logits_scorer.h"
#include "shared_data.h"

namespace chameleon::test::runtime_test {

namespace {

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"));
  return runtime;
}

const std::vector<TokenIds> kRows = {{5, 6, 7}, {8, 9}, {10, 11, 12, 13}};

const Generate kSixteen{.max_new_tokens = 16};
const Adapt kCohort{.mode = Mode::cohort};

/// A caller's factors that are finite, and whose rows' logits are not.
Adapt overflowing() {
  static const std::vector<float> lora_A(16, 3e38F), lora_B(320, 3e38F);
  return {.mode = Mode::static_, .factors = head_factors(1, lora_A, lora_B)};
}

std::vector<TokenIds> token_ids(const std::vector<Generation>& generations) {
  std::vector<TokenIds> ids;
  for (const Generation& generation : generations) ids.push_back(generation.token_ids);
  return ids;
}

}  // namespace

TEST(Inputs, AreChecked) {
  const auto adapt = [](std::vector<TokenIds> rows, const Adapt& how = {}) { (void)runtime().adapt(rows, how); };
  EXPECT_THROW(adapt({}), InputError);
  EXPECT_THROW(adapt({{}}), InputError);
  EXPECT_THROW(adapt({{320}}), TokenError);
  EXPECT_THROW(adapt({{-1}}), TokenError);
  EXPECT_THROW(adapt({TokenIds(49, 1)}), LengthError);
  EXPECT_NO_THROW(adapt({TokenIds(48, 1)}));
  EXPECT_THROW(adapt({{1}}, {.mode = Mode::tenant}), InputError);
  EXPECT_THROW(adapt({{1}}, {.mode = Mode::cohort, .tenants = {{"a"}}}), InputError);
  EXPECT_THROW(adapt({{1}}, {.mode = Mode::tenant, .tenants = {{"a", "b"}}}), InputError);
  EXPECT_THROW(adapt({{1}}, {.mode = Mode::static_}), ModeError);
  const std::vector<std::string> empty = {""}, invalid = {"ok", "\xff"};
  EXPECT_THROW((void)runtime().adapt(empty), InputError);
  EXPECT_THROW((void)runtime().adapt(invalid), InputError);
}

TEST(Inputs, CallersFactorsAreChecked) {
  std::vector<float> lora_A(2 * 16, 1), lora_B(2 * 320, 1);
  const auto adapt = [&](std::size_t rank, Mode mode = Mode::static_) {
    (void)runtime().adapt(kRows, {.mode = mode, .factors = head_factors(rank, lora_A, lora_B)});
  };
  EXPECT_NO_THROW(adapt(2));
  EXPECT_THROW(adapt(2, Mode::cohort), ModeError);
  EXPECT_THROW(adapt(1), FactorsError);
  EXPECT_THROW(adapt(0), FactorsError);
  const auto adapt_changed = [&](const auto& change) {
    Factors factors = head_factors(2, lora_A, lora_B);
    change(factors);
    (void)runtime().adapt(kRows, {.mode = Mode::static_, .factors = factors});
  };
  EXPECT_THROW(adapt_changed([](Factors& factors) { factors.clear(); }), FactorsError);
  EXPECT_THROW(adapt_changed([](Factors& factors) { factors.erase("lm_head.lora_B"); }), FactorsError);
  EXPECT_THROW(adapt_changed([](Factors& factors) { factors["lora_A"] = factors["lm_head.lora_A"]; }), FactorsError);
  EXPECT_THROW(adapt_changed([](Factors& factors) { factors["lm_head.lora_A"].rows = 3; }), FactorsError);
  EXPECT_THROW(
      adapt_changed([&](Factors& factors) { factors["lm_head.lora_A"] = {1, 16, std::span(lora_A).first(16)}; }),
      FactorsError);
  lora_B.back() = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(adapt(2), FactorsError);
}

TEST(Inputs, CallersVectorsAreChecked) {
  const Runtime of_tasks(good_bundle("chameleon_given"));
  EXPECT_EQ(of_tasks.manifest().adaptation.conditioning_size, 5);
  EXPECT_EQ(available_modes(of_tasks.manifest().adaptation), (std::vector{Mode::none, Mode::static_, Mode::request}));
  std::vector<float> values(kRows.size() * 5, 1);
  const auto message = [](const Runtime& runtime, std::optional<Matrix> vectors, Mode mode = Mode::request) {
    try {
      (void)runtime.adapt(kRows, {.mode = mode, .conditioning = vectors});
    } catch (const Error& error) {
      return std::string(error.code()) + ": " + error.what();
    }
    return std::string();
  };
  const Matrix good{3, 5, values};
  const std::string needs = "this bundle needs conditioning in mode 'request', float32 [texts, 5]";
  EXPECT_EQ(message(of_tasks, good), "");
  EXPECT_EQ(message(of_tasks, {}), "mode_unavailable: mode 'request' without conditioning: " + needs);
  EXPECT_EQ(message(of_tasks, good, Mode::none), "mode_unavailable: mode 'none' with conditioning: " + needs);
  EXPECT_EQ(message(of_tasks, {}, Mode::none), "");
  EXPECT_EQ(message(runtime(), good),
            "mode_unavailable: mode 'request' with conditioning: this bundle takes no conditioning");
  EXPECT_EQ(message(of_tasks, Matrix{2, 5, values}),
            "input_invalid: conditioning has shape (2, 5), expected (3, 5): a vector per text");
  EXPECT_EQ(message(of_tasks, Matrix{3, 16, values}),
            "input_invalid: conditioning has shape (3, 16), expected (3, 5): a vector per text");
  EXPECT_EQ(message(of_tasks, Matrix{3, 5, std::span(values).first(14)}),
            "input_invalid: conditioning has 14 values for shape (3, 5)");
  for (const float bad : {NAN, INFINITY}) {
    values.back() = bad;
    EXPECT_EQ(message(of_tasks, good), "input_invalid: conditioning holds NaN or infinity");
  }
}

TEST(Inputs, SamplingIsChecked) {
  for (const Sampling& sampling :
       {Sampling{.temperature = -1}, Sampling{.temperature = 1e-6}, Sampling{.temperature = NAN}, Sampling{.top_k = -1},
        Sampling{.top_p = 0}, Sampling{.top_p = 1.1}, Sampling{.top_p = NAN}, Sampling{.repetition_penalty = 0},
        Sampling{.repetition_penalty = INFINITY}, Sampling{.repetition_penalty = 1e-38}, Sampling{.stop = {""}},
        Sampling{.presence_penalty = 2.1}, Sampling{.frequency_penalty = NAN}, Sampling{.logit_bias = {{5, 101}}},
        Sampling{.logit_bias = {{-1, 1}}}, Sampling{.logprobs = 21}, Sampling{.logprobs = -1}}) {
    EXPECT_THROW(runtime().generate(kRows, {.sampling = sampling}), InputError);
  }
  EXPECT_THROW(runtime().generate(kRows, {.sampling = Sampling{.logit_bias = {{320, 1}}}}), TokenError);
}

TEST(Inputs, GenerateIsChecked) {
  for (const Generate& wrong :
       {Generate{.max_new_tokens = 0}, Generate{.max_new_tokens = TokenIds{1, 2}},
        Generate{.sampling = std::vector<Sampling>(2)}, Generate{.n = 0}, Generate{.n = SIZE_MAX},
        Generate{.deadline = Seconds(0)}, Generate{.deadline = Seconds(NAN)}, Generate{.prompt_lookup_num_tokens = -1},
        Generate{.prompt_lookup_num_tokens = 17}}) {
    EXPECT_THROW(runtime().generate(kRows, wrong), InputError);
  }
}

TEST(Generation, EndsAtTheModelsPositions) {
  const std::vector<TokenIds> rows = {TokenIds(48, 3), TokenIds(46, 3)};
  const auto generations = runtime().generate(rows, {.max_new_tokens = 100}, {.mode = Mode::none});
  EXPECT_EQ(generations[0].token_ids.size(), 1U);
  EXPECT_EQ(generations[1].token_ids.size(), 3U);
  EXPECT_EQ(generations[0].finish_reason, FinishReason::length);
}

TEST(Generation, CachedStepsEqualReadingAllAtOnce) {
  const auto generations = runtime().generate(kRows, {.max_new_tokens = 6}, {.mode = Mode::centroid});
  for (std::size_t row = 0; row < kRows.size(); ++row) {
    TokenIds longer = kRows[row];
    longer.insert(longer.end(), generations[row].token_ids.begin(), generations[row].token_ids.end() - 1);
    // The factors of a row depend on its prompt alone, so the second call gets the same ones.
    const std::vector<TokenIds> prompt = {kRows[row]}, all = {longer};
    const FactorSets sets = runtime().adapt(prompt, {.mode = Mode::centroid}).factors.sets;
    const Factors factors = head_factors(static_cast<std::size_t>(sets.rank), sets.tensors.at("lm_head.lora_A"),
                                         sets.tensors.at("lm_head.lora_B"));
    const auto next = runtime().generate(all, {.max_new_tokens = 1}, {.mode = Mode::static_, .factors = factors});
    EXPECT_EQ(next[0].token_ids[0], generations[row].token_ids.back());
  }
}

TEST(Generation, ContinuationsAreThoseOfAsManyPrompts) {
  const Sampling hot{.temperature = 1.5, .seed = 4};
  std::vector<TokenIds> repeated;
  for (const TokenIds& row : kRows) repeated.insert(repeated.end(), 3, row);
  const auto expected = runtime().generate(repeated, {.sampling = hot}, {.mode = Mode::request});
  const auto found = runtime().generate(kRows, {.sampling = hot, .n = 3}, {.mode = Mode::request});
  EXPECT_EQ(token_ids(found), token_ids(expected));
  EXPECT_NE(found[0].token_ids, found[1].token_ids);
}

TEST(Generation, ADeadlineEndsRows) {
  for (const Generation& generation : runtime().generate(kRows, {.deadline = Seconds(1e-9)})) {
    EXPECT_EQ(generation.finish_reason, FinishReason::deadline);
    EXPECT_TRUE(generation.token_ids.empty());
  }
  EXPECT_EQ(runtime().generate(kRows, {.max_new_tokens = 2, .deadline = Seconds(1e300)})[0].token_ids.size(), 2U);
}

TEST(Generation, LongPromptsAreReadInPiecesAsTheyAreWhole) {
  // Together they are more than one call takes; the positions allow no longer ones.
  std::vector<TokenIds> rows;
  for (std::int64_t i = 0; i < 50; ++i) rows.emplace_back(45, 1 + i);
  const auto together = runtime().generate(rows, {.max_new_tokens = 3}, {.mode = Mode::centroid});
  for (std::size_t row = 0; row < rows.size(); row += 7) {
    const auto alone =
        runtime().generate(std::span(rows).subspan(row, 1), {.max_new_tokens = 3}, {.mode = Mode::centroid});
    EXPECT_EQ(together[row].token_ids, alone[0].token_ids);
  }
}

TEST(Cancellation, OfOneRowLeavesTheOthersAlone) {
  const auto alone = runtime().generate(kRows, kSixteen, kCohort);
  std::size_t seen = 0;
  const auto on_token = [&](const Token& token) { return token.row != 1 || ++seen < 4; };
  const auto cancelled = runtime().stream(kRows, on_token, kSixteen, kCohort);
  EXPECT_EQ(cancelled[1].finish_reason, FinishReason::cancelled);
  EXPECT_EQ(cancelled[1].token_ids, TokenIds(alone[1].token_ids.begin(), alone[1].token_ids.begin() + 4));
  EXPECT_EQ(cancelled[0].token_ids, alone[0].token_ids);
  EXPECT_EQ(cancelled[2].token_ids, alone[2].token_ids);
}

TEST(Cancellation, BeforeAndDuringACall) {
  std::stop_source source;
  std::size_t tokens = 0;
  const auto on_token = [&](const Token&) {
    if (++tokens == 5) source.request_stop();
    return true;
  };
  const auto alone = runtime().generate(kRows, kSixteen, kCohort);
  const auto generations = runtime().stream(kRows, on_token, kSixteen, kCohort, OnError::raise, source.get_token());
  for (std::size_t row = 0; row < kRows.size(); ++row) {
    EXPECT_EQ(generations[row].finish_reason, FinishReason::cancelled);
    EXPECT_EQ(generations[row].token_ids, TokenIds(alone[row].token_ids.begin(), alone[row].token_ids.begin() + 2));
  }
  for (const Generation& generation :  // stopped before it began
       runtime().generate(kRows, kSixteen, kCohort, OnError::raise, source.get_token())) {
    EXPECT_TRUE(generation.token_ids.empty());
    EXPECT_EQ(generation.finish_reason, FinishReason::cancelled);
  }
}

TEST(Cancellation, EndsACallThatReadsPrompts) {
  const std::vector<TokenIds> many(20'000, TokenIds(40, 1));  // seconds of work before the first token
  for (const OnError errors : {OnError::raise, OnError::row}) {
    std::stop_source source;
    std::jthread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      source.request_stop();
    });
    const auto generations = runtime().generate(many, {.max_new_tokens = 1}, kCohort, errors, source.get_token());
    EXPECT_EQ(generations.back().finish_reason, FinishReason::cancelled);
    EXPECT_TRUE(generations.back().token_ids.empty());
  }
}

TEST(Cancellation, OfScoringIsAnErrorOfItsOwn) {
  const auto before = runtime().score(kRows);
  std::stop_source stopped;
  stopped.request_stop();
  EXPECT_THROW((void)runtime().score(kRows, {}, stopped.get_token()), CancelledError);
  const std::vector<TokenIds> many(20'000, TokenIds(40, 1));  // seconds of work
  std::stop_source source;
  std::jthread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    source.request_stop();
  });
  EXPECT_THROW((void)runtime().score(many, {}, source.get_token()), CancelledError);
  EXPECT_EQ(runtime().score(kRows)[0].token_logprobs, before[0].token_logprobs);
}

TEST(Callbacks, AnExceptionReachesTheCallerAndHarmsNothing) {
  const auto before = token_ids(runtime().generate(kRows, kSixteen, kCohort));
  const auto throwing = [](const Token& token) -> bool {
    if (token.row == 2) throw std::domain_error("mine");
    return true;
  };
  EXPECT_THROW(runtime().stream(kRows, throwing, kSixteen, kCohort), std::domain_error);
  EXPECT_EQ(token_ids(runtime().generate(kRows, kSixteen, kCohort)), before);
}

TEST(Numbers, FactorsThatOverflowAreReported) {
  EXPECT_THROW(runtime().generate(kRows, kSixteen, overflowing()), NumericError);
  EXPECT_THROW((void)runtime().score(kRows, overflowing()), NumericError);
}

TEST(Numbers, WhatACallLeavesInMemoryIsNotReadByTheNext) {
  const auto before = token_ids(runtime().generate(kRows, kSixteen, kCohort));
  const std::vector<TokenIds> longer(8, TokenIds(40, 3));
  EXPECT_THROW(runtime().generate(longer, kSixteen, overflowing()), NumericError);  // its cache is larger
  EXPECT_EQ(token_ids(runtime().generate(kRows, kSixteen, kCohort)), before);
}

TEST(PromptLogprobs, AreTheScores) {
  const Adapt request{.mode = Mode::request};
  const std::vector<TokenIds> rows = {{5, 6, 7, 300, 2, 9}, {8}, {10, 11, 12, 13}};
  const auto choices = runtime().prompt_logprobs(rows, runtime().adapt(rows, request).factors, 2);
  const auto scores = runtime().score(rows, request);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    ASSERT_EQ(choices[row].size(), rows[row].size() - 1);
    for (std::size_t i = 0; i < choices[row].size(); ++i) {
      EXPECT_EQ(choices[row][i].token_id, rows[row][i + 1]);
      EXPECT_NEAR(choices[row][i].logprob.value(), scores[row].token_logprobs[i], 1e-4);
      EXPECT_EQ(choices[row][i].top_logprobs.size(), 2U);
    }
  }
  EXPECT_THROW((void)runtime().prompt_logprobs(rows, runtime().adapt(rows).factors, 21), InputError);
  EXPECT_THROW((void)runtime().prompt_logprobs(kRows, runtime().adapt(std::span(rows).first(1)).factors, 0),
               InputError);
}

TEST(PromptLogprobs, AGreedyTokenIsTheFirstAlternativeByTheSameFloat) {
  const Generate greedy{.max_new_tokens = 16, .sampling = Sampling{.ignore_eos = true, .logprobs = 1}};
  const std::vector<TokenIds> prompt = {{5, 6, 7}};
  const Generation generation = runtime().generate(prompt, greedy, {.mode = Mode::none})[0];
  std::vector<TokenIds> whole = prompt;
  whole[0].insert(whole[0].end(), generation.token_ids.begin(), generation.token_ids.end());
  const auto choices = runtime().prompt_logprobs(whole, runtime().adapt(whole, {.mode = Mode::none}).factors, 1)[0];
  for (std::size_t i = 2; i < choices.size(); ++i) {
    EXPECT_EQ(choices[i].top_logprobs, (std::vector<TokenLogprob>{{choices[i].token_id, choices[i].logprob.value()}}));
    EXPECT_NEAR(choices[i].logprob.value(), generation.token_logprobs[i - 2], 1e-4);
  }
}

TEST(Isolation, FactorsDoNotDependOnNeighbours) {
  for (const Mode mode : {Mode::centroid, Mode::request}) {
    const Adaptation together = runtime().adapt(kRows, {.mode = mode});
    for (std::size_t row = 0; row < kRows.size(); ++row) {
      const std::vector<TokenIds> one = {kRows[row]};
      const Adaptation alone = runtime().adapt(one, {.mode = mode});
      const std::size_t size = lora_B_of(alone).size();
      const auto set = static_cast<std::size_t>(together.factors.factor_ids[row]);
      EXPECT_TRUE(std::ranges::equal(lora_B_of(together).subspan(set * size, size), lora_B_of(alone)));
    }
  }
}

TEST(SharedWeights, ChangeNoResultBeyondTheLastBits) {
  const Runtime mapped(good_bundle("chameleon_masked"), {.map_weights = true});
  const auto packed_scores = runtime().score(kRows), mapped_scores = mapped.score(kRows);
  for (std::size_t row = 0; row < kRows.size(); ++row) {
    for (std::size_t i = 0; i < packed_scores[row].token_logprobs.size(); ++i) {
      EXPECT_NEAR(packed_scores[row].token_logprobs[i], mapped_scores[row].token_logprobs[i], 2e-5);
    }
  }
}

TEST(Score, OfABatchThatTakesSeveralCallsIsThatOfEachText) {
  std::vector<TokenIds> rows;  // 24 texts, 944 positions: two calls of the scorer, with one text in both
  for (std::int64_t row = 0; row < 24; ++row) {
    TokenIds& ids = rows.emplace_back();
    for (std::int64_t i = 0; i < 29 + row % 20; ++i) ids.push_back((row * 37 + i * 101) % 320);
  }
  const Adapt request{.mode = Mode::request};  // a text's factors do not depend on the others
  const auto together = runtime().score(rows, request);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::vector<TokenIds> one = {rows[row]};
    const auto alone = runtime().score(one, request);
    ASSERT_EQ(together[row].token_logprobs.size(), rows[row].size() - 1);
    for (std::size_t i = 0; i + 1 < rows[row].size(); ++i) {
      const float expected = alone[0].token_logprobs[i];
      EXPECT_NEAR(together[row].token_logprobs[i], expected, 2e-5F + 1e-6F * std::abs(expected));
    }
  }
}

TEST(Score, FromLogits) {
  const std::vector<TokenIds> texts = {{3, 1, 2}, {0, 2}, {1, 1, 1, 1}};
  const std::vector<std::span<const std::int64_t>> rows(texts.begin(), texts.end());
  std::vector<std::vector<std::int64_t>> calls;
  // The logit of token t after token id of a text with factor set f is t * id + f * f * t.
  const auto all_logits = [&](Rows members, const RowFactors& factors) {
    calls.push_back(factors.factor_ids);
    const auto width = std::ranges::max(members, {}, &std::span<const std::int64_t>::size).size();
    auto values = std::make_shared<std::vector<float>>(members.size() * width * 4);
    for (std::size_t row = 0; row < members.size(); ++row) {
      for (std::size_t i = 0; i < members[row].size(); ++i) {
        for (std::size_t t = 0; t < 4; ++t) {
          const auto slope = static_cast<float>(members[row][i] + factors.factor_ids[row] * factors.factor_ids[row]);
          (*values)[(row * width + i) * 4 + t] = static_cast<float>(t) * slope;
        }
      }
    }
    return Logits(values->data(), width, 4, values);
  };
  const auto logprobs = logprobs_of_logits(rows, {{}, {0, 1, 0}}, 2, {}, all_logits);
  EXPECT_EQ(calls, (std::vector<std::vector<std::int64_t>>{{0, 1}, {0}}));
  const auto expected = [](float target, float slope) {
    return target * slope - std::log(1 + std::exp(slope) + std::exp(2 * slope) + std::exp(3 * slope));
  };
  const std::vector<std::vector<float>> all = {
      {expected(1, 3), expected(2, 1)}, {expected(2, 1)}, {expected(1, 1), expected(1, 1), expected(1, 1)}};
  for (std::size_t row = 0; row < all.size(); ++row) {
    ASSERT_EQ(logprobs[row].size(), all[row].size());
    for (std::size_t i = 0; i < all[row].size(); ++i) EXPECT_NEAR(logprobs[row][i], all[row][i], 1e-6);
  }
}

TEST(Score, OfOneTokenPredictsNothing) {
  const std::vector<TokenIds> rows = {{4}, {4, 5}};
  const auto scores = runtime().score(rows);
  EXPECT_TRUE(scores[0].token_logprobs.empty());
  EXPECT_TRUE(std::isnan(scores[0].perplexity()));
  EXPECT_FLOAT_EQ(static_cast<float>(scores[1].logprob()), scores[1].token_logprobs[0]);
}

}  // namespace chameleon::test::runtime_test
