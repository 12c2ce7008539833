// The engine: rows of many callers in one batch, each as if it were alone, and each fault its own request's.
//
// CHAMELEON_REQUESTS=10000 sends as many under load.

#include "chameleon/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <latch>
#include <random>
#include <thread>

#include "shared_data.h"

namespace chameleon::test::engine_test {

namespace {

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  return runtime;
}

const Sampling kHot{.temperature = 1.3, .top_p = 0.95, .seed = 5};
const Sampling kEndless{.ignore_eos = true};
constexpr std::int64_t kLong = 40;

std::vector<TokenIds> prompts_of(std::initializer_list<std::size_t> lengths) {
  std::mt19937 random(static_cast<unsigned int>(lengths.size()));
  std::vector<TokenIds> prompts;
  for (const std::size_t length : lengths) {
    TokenIds& ids = prompts.emplace_back();
    for (std::size_t i = 0; i < length; ++i) ids.push_back(1 + static_cast<std::int64_t>(random() % 319));
  }
  return prompts;
}

struct Kind {
  Mode mode;
  Sampling sampling;
  std::int64_t max_new_tokens;
};

const std::vector<Kind> kMixed = {
    {Mode::none, {}, 20},
    {Mode::centroid, {.logprobs = 2}, 3},
    {Mode::request, {}, 12},
    {Mode::cohort, {}, 9},
    {Mode::centroid, kHot, 15},
    {Mode::request, {.temperature = 0.7, .repetition_penalty = 1.2, .seed = 9}, 1},
    {Mode::none, kHot, 11},
    {Mode::centroid, {.stop = {"e", "\n"}}, 20},
    {Mode::request, {.frequency_penalty = 1}, 7},
};

Generate endless(std::int64_t max_new_tokens = kLong, std::size_t n = 1) {
  return {.max_new_tokens = max_new_tokens, .sampling = kEndless, .n = n};
}

/// n rows of one prompt as `generate` makes them.
std::vector<Generation> alone(const TokenIds& prompt, const Kind& kind, std::size_t n = 1) {
  const std::vector<TokenIds> rows(n, prompt);
  const Generate generate{.max_new_tokens = kind.max_new_tokens, .sampling = kind.sampling};
  return runtime().generate(rows, generate, {.mode = kind.mode});
}

void expect_same(const std::vector<Generation>& found, const std::vector<Generation>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t row = 0; row < found.size(); ++row) {
    EXPECT_EQ(found[row].token_ids, expected[row].token_ids);
    EXPECT_EQ(found[row].text, expected[row].text);
    EXPECT_EQ(found[row].finish_reason, expected[row].finish_reason);
    EXPECT_EQ(found[row].cluster_id, expected[row].cluster_id);
    ASSERT_EQ(found[row].token_logprobs.size(), expected[row].token_logprobs.size());
    for (std::size_t i = 0; i < expected[row].token_logprobs.size(); ++i) {
      EXPECT_NEAR(found[row].token_logprobs[i], expected[row].token_logprobs[i], 1e-4);
      EXPECT_EQ(found[row].top_logprobs[i].size(), expected[row].top_logprobs[i].size());
    }
  }
}

Stream submit(Engine& engine, const TokenIds& prompt, const Generate& generate,
              const Adapt& adapt = {.mode = Mode::none}) {
  return engine.submit(std::span(&prompt, 1), generate, adapt);
}

Stream submit(Engine& engine, const TokenIds& prompt, const Kind& kind, std::size_t n = 1) {
  const Generate generate{.max_new_tokens = kind.max_new_tokens, .sampling = std::vector{kind.sampling}, .n = n};
  return submit(engine, prompt, generate, {.mode = kind.mode});
}

void until(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << "it never happened";
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

/// For an engine that is slower than the thread that submits to it.
void sleep_after(const Iteration&) { std::this_thread::sleep_for(std::chrono::milliseconds(10)); }

std::size_t env(const char* name, std::size_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::stoul(value) : otherwise;
}

}  // namespace

TEST(Engine, EachPromptHasTheCallersVector) {
  const Runtime of_tasks(good_bundle("chameleon_given"), {.threads = 1});
  const auto prompts = prompts_of({5, 12, 5, 3});
  std::vector<float> values(prompts.size() * 5);  // two tasks
  for (std::size_t row = 0; row < prompts.size(); ++row) values[row * 5 + row % 2] = 1;
  const Adapt adapt{.mode = Mode::request, .conditioning = Matrix{prompts.size(), 5, values}};
  const auto expected = of_tasks.generate(prompts, {}, adapt);
  Engine engine(of_tasks, {.rows = 3, .prefill_tokens = 8});
  Stream stream = engine.submit(prompts, {}, adapt);
  EXPECT_THROW(engine.submit(prompts, {}, {.mode = Mode::request}), ModeError);
  EXPECT_THROW(engine.submit(prompts, {}, {.mode = Mode::none, .conditioning = adapt.conditioning}), ModeError);
  EXPECT_THROW(engine.submit(std::span(prompts).first(2), {}, adapt), InputError);
  std::vector<Stream> others;  // one prompt each, among those that wait
  for (std::size_t row = 0; row < prompts.size(); ++row) {
    const Matrix own{1, 5, std::span(values).subspan(row * 5, 5)};
    others.push_back(submit(engine, prompts[row], Generate{}, {.mode = Mode::request, .conditioning = own}));
  }
  std::ranges::fill(values, 9.F);  // they were copied
  expect_same(stream.result(), expected);
  for (std::size_t row = 0; row < prompts.size(); ++row) expect_same(others[row].result(), {expected[row]});

  for (std::size_t row = 0; row < prompts.size(); ++row) {
    std::ranges::fill(std::span(values).subspan(row * 5, 5), 0.F);
    values[row * 5 + (row + 1) % 2] = 1;  // of the next row
  }
  const auto swapped = of_tasks.generate(prompts, {}, adapt);
  for (std::size_t row = 0; row < prompts.size(); ++row) EXPECT_NE(swapped[row].token_ids, expected[row].token_ids);
}

TEST(Engine, ARequestAmongOthersIsAsIfAlone) {
  Engine engine(runtime(), {.rows = 4, .prefill_tokens = 8});
  const auto prompts = prompts_of({5, 28, 1, 17, 20, 2, 9, 25, 8});
  std::vector<Stream> streams;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    streams.push_back(submit(engine, prompts[i], kMixed[i]));
  }
  for (std::size_t i = 0; i < prompts.size(); ++i) expect_same(streams[i].result(), alone(prompts[i], kMixed[i]));
}

TEST(Engine, ASubmitOfManyPromptsIsWhatGenerateMakesOfThem) {
  Engine engine(runtime(), {.rows = 4});
  const auto prompts = prompts_of({5, 18, 1, 17, 20, 2, 9, 3, 8});
  for (const Mode mode : {Mode::cohort, Mode::request, Mode::tenant}) {
    Adapt adapt{.mode = mode};
    if (mode == Mode::tenant) adapt.tenants = {"a", "b", "a", "a", "b", "b", "a", "c", "a"};
    const Stream stream = engine.submit(prompts, {.sampling = kHot}, adapt);
    const auto expected = runtime().generate(prompts, {.sampling = kHot}, adapt);
    expect_same(stream.result(), expected);
    for (std::size_t row = 0; row < prompts.size(); ++row) {
      EXPECT_EQ(stream.cluster_ids()[row], expected[row].cluster_id);
    }
    EXPECT_EQ(stream.cohort().has_value(), mode != Mode::request);
  }
}

TEST(Engine, ContinuationsDrawFromStreamsOfTheirOwn) {
  Engine engine(runtime(), {.rows = 3});
  const auto prompt = prompts_of({20})[0];
  for (const Mode mode : {Mode::none, Mode::centroid}) {
    const Kind kind{mode, kHot, 12};
    expect_same(submit(engine, prompt, kind, 7).result(), alone(prompt, kind, 7));  // more than rows
  }
}

TEST(Engine, ACancelledStreamKeepsWhatItHas) {
  Engine engine(runtime(), {.observe = sleep_after});
  const Stream stream = submit(engine, prompts_of({5})[0], endless());
  TokenIds token_ids;
  std::string text;
  std::shared_ptr<const Generation> last;
  while (const auto token = stream.next()) {
    if (token->token_id >= 0) token_ids.push_back(token->token_id);
    text += token->text;
    last = token->generation;
    if (token_ids.size() == 3) stream.cancel();
  }
  const Generation generation = stream.result()[0];
  ASSERT_NE(last, nullptr);
  EXPECT_EQ(generation.finish_reason, FinishReason::cancelled);
  EXPECT_LT(generation.token_ids.size(), static_cast<std::size_t>(kLong));
  EXPECT_EQ(generation.token_ids, token_ids);
  EXPECT_EQ(generation.text, text);
  EXPECT_FALSE(stream.next().has_value());
}

TEST(Engine, ACancelledSubmitLeavesTheQueueToo) {
  Engine engine(runtime(), {.rows = 1, .max_waiting = 4096});
  const Stream stream = engine.submit(std::vector<TokenIds>(16, {1}), endless(kLong, 128), {.mode = Mode::none});
  until([&] { return engine.stats().running == 1; });
  stream.cancel();
  until([&] { return engine.stats().running + engine.stats().waiting == 0; });
  std::size_t never_ran = 0;
  for (const Generation& generation : stream.result()) {
    const bool is_cancelled = generation.finish_reason == FinishReason::cancelled;
    never_ran += is_cancelled && generation.token_ids.empty() ? 1 : 0;
  }
  EXPECT_GT(never_ran, 1000U);
  EXPECT_EQ(engine.stats().factor_sets + engine.stats().cached_tokens, 0U);
  EXPECT_EQ(submit(engine, prompts_of({5})[0], endless(3)).result()[0].token_ids.size(), 3U);
}

TEST(Engine, AStreamThatNobodyReadsHoldsNobodyUp) {
  Engine engine(runtime(), {.rows = 4});
  const TokenIds prompt = prompts_of({5})[0];
  std::vector<Stream> unread;
  for (int i = 0; i < 64; ++i) {
    unread.push_back(submit(engine, prompt, endless()));
    (void)submit(engine, prompt, endless());  // and forgotten at once
  }
  expect_same(submit(engine, prompt, kMixed[4]).result(), alone(prompt, kMixed[4]));
  until([&] { return engine.stats().running + engine.stats().waiting == 0; });
  for (const Stream& stream : unread) {
    ASSERT_TRUE(stream.done());
    TokenIds token_ids;
    while (const auto token = stream.next()) token_ids.push_back(token->token_id);
    EXPECT_EQ(token_ids, stream.result()[0].token_ids);
    EXPECT_EQ(token_ids.size(), static_cast<std::size_t>(kLong));
  }
}

TEST(Engine, ACallbackGetsTheTokensAndMayEndItsRow) {
  Engine engine(runtime());
  const auto prompts = prompts_of({5, 9, 3});
  std::vector<TokenIds> seen(3);
  const auto on_token = [&](const Token& token) {
    if (token.token_id >= 0) seen[token.row].push_back(token.token_id);
    if (token.row == 2 && seen[2].size() == 2) throw std::domain_error("mine");
    return token.row != 1 || seen[1].size() < 3;
  };
  const Stream stream = engine.submit(prompts, endless(12), {.mode = Mode::none}, on_token);
  const auto generations = stream.result();
  EXPECT_FALSE(stream.next().has_value());
  for (std::size_t row = 0; row < 3; ++row) EXPECT_EQ(generations[row].token_ids, seen[row]);
  EXPECT_EQ(seen[0].size(), 12U);
  EXPECT_EQ(seen[1].size(), 3U);
  EXPECT_EQ(seen[2].size(), 2U);
  EXPECT_EQ(generations[0].finish_reason, FinishReason::length);
  EXPECT_EQ(generations[1].finish_reason, FinishReason::cancelled);
  EXPECT_EQ(generations[2].finish_reason, FinishReason::cancelled);
}

TEST(Engine, ADeadlineEndsRowsThatRunAndRowsThatWait) {
  Engine engine(runtime(), {.rows = 4});
  const auto prompts = prompts_of({5, 5, 5, 5, 5, 5, 5, 5, 5});
  for (const auto& [deadline, reason] :
       {std::pair(Seconds(1e-6), FinishReason::deadline), std::pair(Seconds(1e300), FinishReason::length)}) {
    Generate generate = endless();
    generate.deadline = deadline;
    for (const Generation& generation : engine.submit(prompts, generate).result()) {
      EXPECT_EQ(generation.finish_reason, reason);
    }
  }
  until([&] { return engine.stats().factor_sets == 0; });
}

TEST(Engine, AFullQueueRefusesAndAcceptsAgain) {
  Engine engine(runtime(), {.rows = 2, .max_waiting = 3, .observe = sleep_after});
  std::vector<Stream> kept;
  EXPECT_THROW(while (kept.size() < 10'000) kept.push_back(submit(engine, prompts_of({5})[0], endless())),
               QueueFullError);
  EXPECT_GE(kept.size(), 5U);
  EXPECT_THROW(submit(engine, prompts_of({5})[0], endless(kLong, 2)), QueueFullError);  // one would fit soon
  EXPECT_FALSE(kept.back().wait(Seconds(0)));
  EXPECT_TRUE(kept.back().wait(Seconds(60)));
  EXPECT_TRUE(kept.back().next().has_value());
  EXPECT_THROW(engine.submit(prompts_of({5, 5, 5, 5, 5, 5}), endless()), InputError);
  for (const Stream& stream : kept) EXPECT_EQ(stream.result()[0].finish_reason, FinishReason::length);
  EXPECT_EQ(submit(engine, prompts_of({5})[0], endless(3)).result()[0].token_ids.size(), 3U);
}

TEST(Engine, CloseFinishesWhatWasAccepted) {
  Engine engine(runtime(), {.rows = 2});
  std::vector<Stream> streams;
  for (int i = 0; i < 20; ++i) streams.push_back(submit(engine, prompts_of({5})[0], kMixed[4], 4));
  EXPECT_FALSE(engine.closed());
  std::size_t read = 0;
  std::jthread reader([&] {
    while (const auto token = streams.back().next()) read += token->token_id >= 0 ? 1 : 0;
  });
  engine.close();
  reader.join();
  std::size_t generated = 0;
  for (const Generation& generation : streams.back().result()) generated += generation.token_ids.size();
  EXPECT_EQ(read, generated);
  EXPECT_TRUE(engine.closed());
  for (const Stream& stream : streams) {
    ASSERT_TRUE(stream.done());
    EXPECT_NE(stream.result()[0].finish_reason, FinishReason::cancelled);
  }
  const Stats stats = engine.stats();
  EXPECT_EQ(stats.running + stats.waiting + stats.factor_sets + stats.cached_tokens, 0U);
  EXPECT_THROW(submit(engine, prompts_of({5})[0], Generate{}), ClosedError);
  engine.close();
}

TEST(Engine, CloseCancelsWhatTakesTooLong) {
  Engine engine(runtime(), {.rows = 1});
  std::vector<Stream> streams;
  for (int i = 0; i < 200; ++i) streams.push_back(submit(engine, prompts_of({5})[0], endless()));
  std::jthread patient([&] { engine.close(Seconds(600)); });  // the second call ends its patience
  std::shared_ptr<const Generation> last;
  std::jthread reader([&] {
    while (const auto token = streams.back().next()) last = token->generation;
  });
  until([&] { return engine.closed(); });
  engine.close(Seconds(0));
  reader.join();
  ASSERT_NE(last, nullptr);
  EXPECT_EQ(last->finish_reason, FinishReason::cancelled);
  std::size_t cancelled = 0;
  for (const Stream& stream : streams) {
    ASSERT_TRUE(stream.done());
    cancelled += stream.result()[0].finish_reason == FinishReason::cancelled ? 1 : 0;
  }
  EXPECT_GT(cancelled, 0U);
}

TEST(Engine, ARowThatIsNotFiniteEndsAlone) {
  Engine engine(runtime(), {.rows = 4});
  const auto prompts = prompts_of({5, 9, 12, 3});
  CallerFactors overflowing(2, runtime().manifest().model);
  std::ranges::fill(overflowing.values, 3e38F);
  std::vector<Stream> good;
  for (std::size_t i = 0; i < 2; ++i) good.push_back(submit(engine, prompts[i], kMixed[4]));
  const Stream bad = submit(engine, prompts[0], Generate{}, {.mode = Mode::static_, .factors = overflowing.factors()});
  for (std::size_t i = 2; i < 4; ++i) good.push_back(submit(engine, prompts[i], kMixed[4]));
  const Generation generation = bad.result()[0];
  EXPECT_EQ(generation.finish_reason, FinishReason::error);
  ASSERT_TRUE(generation.error.has_value());
  EXPECT_STREQ(generation.error->code(), NumericError::code_word);
  for (std::size_t i = 0; i < 4; ++i) expect_same(good[i].result(), alone(prompts[i], kMixed[4]));
}

TEST(Engine, ACohortWindowJoinsCallersAndSaysSo) {
  const auto prompts = prompts_of({5, 9, 12, 3});
  const auto expected = runtime().generate(prompts, {.sampling = std::vector(4, kHot)}, {.mode = Mode::cohort});
  Engine engine(runtime(), {.cohort_window = Seconds(0.5)});
  std::vector<Stream> streams;
  for (const TokenIds& prompt : prompts) streams.push_back(submit(engine, prompt, {Mode::cohort, kHot, 20}));
  const Stream other = submit(engine, prompts[0], {Mode::centroid, kHot, 20});
  for (std::size_t i = 0; i < 4; ++i) {
    expect_same(streams[i].result(), {expected[i]});
    ASSERT_TRUE(streams[i].cohort().has_value());
    EXPECT_EQ(streams[i].cohort(), streams[0].cohort());
    EXPECT_EQ(streams[i].cohort()->size, 4U);
  }
  EXPECT_FALSE(other.cohort().has_value());
  std::vector<Stream> apart;
  for (const char* tenant : {"a", "b"}) {
    const Adapt adapt{.mode = Mode::tenant, .tenants = {{tenant}}};
    apart.push_back(submit(engine, prompts[0], {.sampling = std::vector{kHot}}, adapt));
  }
  for (const Stream& stream : apart) EXPECT_EQ(stream.cohort().has_value() ? 1U : stream.result().size(), 1U);
  expect_same(apart[0].result(), apart[1].result());
  EXPECT_EQ(apart[0].cohort()->size, 1U);
  EXPECT_NE(apart[0].cohort()->id, apart[1].cohort()->id);
}

TEST(Engine, AClosingEngineDoesNotWaitForMoreOfACohort) {
  const auto prompts = prompts_of({5, 9});
  const auto expected = runtime().generate(prompts, {.max_new_tokens = 4}, {.mode = Mode::cohort});
  Engine engine(runtime(), {.cohort_window = Seconds(600)});
  std::vector<Stream> streams;
  for (const TokenIds& prompt : prompts) {
    streams.push_back(submit(engine, prompt, Generate{.max_new_tokens = 4}, {.mode = Mode::cohort}));
  }
  const auto began = std::chrono::steady_clock::now();
  engine.close(Seconds(300));
  EXPECT_LT(std::chrono::steady_clock::now() - began, Seconds(60));
  for (std::size_t i = 0; i < 2; ++i) expect_same(streams[i].result(), {expected[i]});
}

TEST(Engine, OnlyTheFirstTokensAdapt) {
  Engine engine(runtime());
  const auto prompt = prompts_of({30})[0];
  const Adapt adapt{.mode = Mode::request, .adapt_tokens = 3};
  const std::vector<TokenIds> first = {{prompt.begin(), prompt.begin() + 3}}, whole = {prompt};
  const auto expected = runtime().adapt(first, {.mode = Mode::request});
  EXPECT_EQ(submit(engine, prompt, Generate{}, adapt).cluster_ids(), expected.cluster_ids);
  EXPECT_EQ(runtime().adapt(whole, adapt).embeddings, expected.embeddings);
}

TEST(Engine, WhatItSaysOfItself) {
  std::vector<Iteration> iterations;
  {
    Engine engine(runtime(), {.rows = 2, .prefill_tokens = 8, .observe = [&](const Iteration& iteration) {
                                iterations.push_back(iteration);
                                throw std::runtime_error("an observer's fault ends nobody");
                              }});
    EXPECT_EQ(engine.stats().cache_capacity, 2U * 48U);
    EXPECT_EQ(engine.submit(prompts_of({20, 5, 3}), endless(4, 2), {.mode = Mode::centroid}).result().size(), 6U);
  }
  std::size_t finished = 0, first = 0, later = 0, queued = 0, rows = 0, chunks = 0;
  for (const Iteration& iteration : iterations) {
    for (const FinishedRow& row : iteration.finished) {
      EXPECT_EQ(row.mode, Mode::centroid);
      EXPECT_EQ(row.finish_reason, FinishReason::length);
      EXPECT_EQ(row.new_tokens, 4U);
    }
    finished += iteration.finished.size();
    first += iteration.first_tokens.size();
    later += iteration.later_tokens.size();
    queued += iteration.queued.size();
    rows += iteration.rows;
    chunks += iteration.prefilled_tokens;
    EXPECT_LE(iteration.rows, 2U);
    EXPECT_EQ(iteration.step > Seconds::zero(), iteration.rows > 0);
  }
  EXPECT_EQ(finished, 6U);
  EXPECT_EQ(first, 6U);
  EXPECT_EQ(later, 18U);
  EXPECT_EQ(queued, 6U);
  EXPECT_EQ(rows, 24U);
  EXPECT_EQ(chunks, 19U + 4U + 2U);  // each prompt once, its last token by a step
}

TEST(Engine, BadArgumentsAreRefusedAtOnce) {
  Engine engine(runtime(), {.rows = 2, .capacity = 40});
  const auto refused = [&](const Generate& generate, const Adapt& adapt = {}, std::vector<TokenIds> prompts = {{1}}) {
    (void)engine.submit(prompts, generate, adapt);
  };
  EXPECT_THROW(refused({}, {}, {}), InputError);
  EXPECT_THROW(refused({}, {}, {{}}), InputError);
  EXPECT_THROW(refused({}, {}, {{320}}), TokenError);
  EXPECT_THROW(refused({}, {}, {TokenIds(41, 1)}), LengthError);
  EXPECT_THROW(refused({}, {.mode = Mode::static_}), ModeError);
  EXPECT_THROW(refused({}, {.factors = Factors{}}), ModeError);
  EXPECT_THROW(refused({}, {.mode = Mode::static_, .factors = Factors{}}), FactorsError);
  EXPECT_THROW(refused({}, {.mode = Mode::tenant}), InputError);
  EXPECT_THROW(refused({}, {.tenants = {{"a"}}}), InputError);
  EXPECT_THROW(refused({}, {.adapt_tokens = 0}), InputError);
  EXPECT_THROW(refused({.n = 0}), InputError);
  EXPECT_THROW(refused({.n = SIZE_MAX}), InputError);
  EXPECT_THROW(refused({.max_new_tokens = 0}), InputError);
  EXPECT_THROW(refused({.max_new_tokens = TokenIds{1, 2}}), InputError);
  EXPECT_THROW(refused({.sampling = std::vector<Sampling>(2)}), InputError);
  EXPECT_THROW(refused({.sampling = Sampling{.top_p = 2}}), InputError);
  EXPECT_THROW(refused({.deadline = Seconds(0)}), InputError);
  EXPECT_THROW(refused({.deadline = Seconds(NAN)}), InputError);
  EXPECT_THROW(refused({.prompt_lookup_num_tokens = 17}), InputError);
  EXPECT_EQ(engine.stats().waiting, 0U);
  EXPECT_EQ(submit(engine, TokenIds(40, 1), endless()).result()[0].token_ids.size(), 1U);
}

TEST(Engine, APromptThatComesAgainIsFoundInThePrefixCache) {
  Engine engine(runtime(), {.prefill_tokens = 16, .prefix_cache_bytes = 1 << 20});
  const TokenIds prompt = prompts_of({40})[0];
  const auto ask = [&](const std::string& salt, bool cache_generated = true) {
    Generate generate = endless(4);
    generate.cache_salt = salt;
    generate.cache_generated = cache_generated;
    const Stream stream = submit(engine, prompt, generate);
    expect_same(stream.result(), alone(prompt, {Mode::none, kEndless, 4}));
    return stream.cached_tokens()[0];
  };
  EXPECT_EQ(ask("a"), 0U);
  EXPECT_EQ(ask("a"), 32U);
  EXPECT_EQ(ask("a", false), 32U);  // two whole chunks
  EXPECT_EQ(ask("b"), 0U);
  EXPECT_EQ(engine.prefix_cache_stats("a").tokens, 32U);
  EXPECT_EQ(engine.prefix_cache_stats().tokens, 64U);
  EXPECT_EQ(engine.prefix_cache_stats().hits, 64U);
  EXPECT_EQ(engine.prefix_cache_stats().queries, 160U);
  engine.clear_prefix_cache("a");
  EXPECT_EQ(engine.prefix_cache_stats().tokens, 32U);
  EXPECT_EQ(ask("a"), 0U);
  Engine without(runtime(), {.prefix_cache_bytes = 0});
  EXPECT_EQ(without.prefix_cache_stats().max_bytes, 0U);
}

TEST(Engine, TenantsAreHeldToTheirLimits) {
  std::vector<FinishedRow> finished;
  std::latch refused(1);  // no row ends before, however busy the machine is
  Engine engine(runtime(), {.rows = 2, .max_waiting = 20, .observe = [&](const Iteration& iteration) {
                              refused.wait();
                              finished.insert(finished.end(), iteration.finished.begin(), iteration.finished.end());
                            }});
  const auto ask = [&](const Tenant& tenant, std::int64_t tokens) {
    const std::vector<TokenIds> prompts = {{1, 2, 3}};
    return engine.submit(prompts, endless(tokens), {.mode = Mode::none}, {}, tenant);
  };
  const Tenant limited{.name = "a", .max_waiting = 0};
  const std::vector<Stream> streams = {ask(limited, kLong), ask(limited, kLong)};
  EXPECT_THROW(ask(limited, 1), QueueFullError);
  refused.count_down();
  EXPECT_EQ(ask({.name = "b"}, 2).result().size(), 1U);
  for (const Stream& stream : streams) (void)stream.result();
  const Tenant poor{.name = "p", .tokens_per_minute = 4};
  EXPECT_EQ(ask(poor, 30).result().size(), 1U);
  EXPECT_THROW(ask(poor, 1), RateLimitError);
  for (const Tenant& bad : {Tenant{.weight = 0}, Tenant{.weight = 1001}, Tenant{.rows = 0}}) {
    EXPECT_THROW(ask(bad, 1), InputError);
  }
  engine.close();
  ASSERT_EQ(finished.size(), 4U);
  for (const FinishedRow& row : finished) {
    EXPECT_FALSE(row.tenant.empty());
    ASSERT_TRUE(row.queued && row.first_token);
    EXPECT_LE(*row.queued, *row.first_token);
    EXPECT_LE(*row.first_token, row.seconds);
  }
}

TEST(Engine, BadSettingsAreRefused) {
  EXPECT_THROW(Engine(runtime(), {.rows = 0}), InputError);
  EXPECT_THROW(Engine(runtime(), {.prefill_tokens = 7}), InputError);
  EXPECT_THROW(Engine(runtime(), {.max_factor_sets = 0}), InputError);
  EXPECT_THROW(Engine(runtime(), {.cohort_window = Seconds(-1)}), InputError);
  EXPECT_THROW(Engine(runtime(), {.rows = SIZE_MAX / 2}), InputError);
}

TEST(Engine, ManyThreads) {
  const auto prompts = prompts_of({5, 28, 1, 17, 20, 2, 9, 25, 8, 3, 30, 11, 6, 4, 22, 13});
  struct Case {
    TokenIds prompt;
    Kind kind;
    std::size_t n;
    std::vector<Generation> expected;
    std::vector<Choice> logprobs;  // of the prompt
  };
  const auto logprobs_of = [](const TokenIds& prompt, Mode mode) {
    const std::span texts(&prompt, 1);
    return runtime().prompt_logprobs(texts, runtime().adapt(texts, {.mode = mode}).factors, 2)[0];
  };
  std::vector<Case> cases;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const Kind& kind = kMixed[(i * 5) % kMixed.size()];
    const std::size_t n = 1 + (i % 4) / 2;
    cases.push_back({prompts[i], kind, n, alone(prompts[i], kind, n), logprobs_of(prompts[i], kind.mode)});
  }
  Engine engine(runtime(), {.rows = 8, .max_waiting = 2000, .prefill_tokens = 16, .max_factor_sets = 5});
  const std::size_t requests = env("CHAMELEON_REQUESTS", 400);
  std::atomic<std::size_t> next = 0, cancelled = 0;
  {
    std::vector<std::jthread> pool;
    for (int i = 0; i < 64; ++i) {
      pool.emplace_back([&] {
        for (std::size_t number = next++; number < requests; number = next++) {
          const Case& one = cases[(number * 7) % cases.size()];
          if (number % 10 == 3) {  // beside the engine
            const auto found = logprobs_of(one.prompt, one.kind.mode);
            for (std::size_t j = 0; j < found.size(); ++j) EXPECT_EQ(found[j].logprob, one.logprobs[j].logprob);
          }
          Generate generate{.max_new_tokens = one.kind.max_new_tokens, .sampling = one.kind.sampling, .n = one.n};
          generate.prompt_lookup_num_tokens = number % 3 == 0 ? 4 : 0;
          const Stream stream = submit(engine, one.prompt, generate, {.mode = one.kind.mode});
          if (number % 10 == 7) continue;  // nobody reads it
          if (number % 10 == 0) {
            if (number % 20 == 0) (void)stream.next();
            stream.cancel();
            (void)stream.result();
            ++cancelled;
            continue;
          }
          while (number % 2 == 0 && stream.next()) {
          }
          expect_same(stream.result(), one.expected);
        }
      });
    }
  }
  EXPECT_GT(cancelled, 0U);
  until([&] { return engine.stats().running + engine.stats().waiting == 0; });
  const Stats stats = engine.stats();
  EXPECT_EQ(stats.factor_sets + stats.cached_tokens, 0U);
}

TEST(Engine, KeysAndValuesFitIntoTheFreeMemory) {
  const Engine few(runtime(), {.rows = 2});
  EXPECT_EQ(few.stats().cache_capacity, 2U * static_cast<std::size_t>(runtime().manifest().model.max_positions));
  const Engine small(runtime(), {.rows = 2, .capacity = 5});
  EXPECT_EQ(small.stats().cache_capacity, 10U);
  const std::size_t many = std::size_t{1} << 48;  // more than any machine has, whatever a row takes
  for (const std::optional<std::size_t>& capacity : {std::optional<std::size_t>(), std::optional<std::size_t>(5)}) {
    try {
      const Engine engine(runtime(), {.rows = many, .capacity = capacity});
      ADD_FAILURE() << "nothing was thrown";
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find("pass fewer rows or a smaller capacity"), std::string::npos);
    }
  }
}

}  // namespace chameleon::test::engine_test
