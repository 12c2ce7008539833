// The work of the engine's thread, one iteration at a time: what runs between two tokens, and what a fault ends.

#include "engine/loop.h"

#include <gtest/gtest.h>

#include "decode/shared_cache.h"
#include "device/static_batch.h"
#include "shared_data.h"

namespace chameleon::test::loop_test {

namespace {

constexpr std::size_t kCapacity = 48;

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  return runtime;
}

const SharedCacheDecoder& shared_decoder() {
  return dynamic_cast<const SharedCacheDecoder&>(*runtime().impl().backend.decoder);
}

/// The runtime's decoder as a device's, whose rows begin together; one of its calls may fail.
class Device final : public StaticDecoder {
 public:
  struct SlotsCache final : Cache {
    std::unique_ptr<Slots> slots;
  };

  std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors,
                                                    std::size_t capacity) const override {
    auto cache = std::make_unique<SlotsCache>();
    cache->slots = shared_decoder().slots(rows.size(), capacity);
    const auto values = std::make_shared<std::vector<float>>(cache->slots->prefill(0, rows, factors, true));
    return {Logits(values->data(), 1, values->size() / rows.size(), values), std::move(cache)};
  }
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache) const override {
    if (fails) throw GraphError("out of memory");
    Slots& slots = *dynamic_cast<SlotsCache&>(cache).slots;
    slots.step(token_ids, factors);
    return slots.logits();
  }
  void select(Cache& cache, std::span<const std::size_t> rows) const override {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (i != rows[i]) dynamic_cast<SlotsCache&>(cache).slots->move(rows[i], i);
    }
  }
  void all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                  const std::stop_token& stop) const override {
    shared_decoder().all_logits(rows, factors, take, stop);
  }
  [[nodiscard]] std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                               const std::stop_token& stop) const override {
    return shared_decoder().token_logprobs(rows, factors, stop);
  }
  bool fails = false;
};

/// The engine without its thread: every iteration is asked for.
class Bench {
 public:
  explicit Bench(const Decoder& decoder = shared_decoder(), std::size_t rows = 3, std::size_t max_factor_sets = 3)
      : table(max_factor_sets),
        batch(open_batch(decoder, table, rows, kCapacity, {8})),
        loop(*batch, table, runtime().tokenizer(), runtime().manifest().model.eos_token_id) {}

  Stream submit(TokenIds prompt, Mode mode = Mode::none, std::int64_t max_new_tokens = 20, std::size_t n = 1) {
    Generate generate{.max_new_tokens = max_new_tokens, .sampling = Sampling{.ignore_eos = true}, .n = n};
    generate.prompt_lookup_num_tokens = draft_tokens;
    const Submission submission = prepare(runtime().impl(), std::span(&prompt, 1), generate, {.mode = mode}, kCapacity);
    form_cohort(runtime().impl(), std::span(&submission, 1), 0);
    loop.wait(submission.members);
    return Stream(submission.stream);
  }

  Iteration iterate() {
    const Loop::Result result = loop.iterate();
    for (const auto& [stream, token] : result.tokens) stream->deliver(token);
    return result.iteration;
  }

  void run() {
    while (!loop.empty()) iterate();
  }

  std::int64_t draft_tokens = 0;  // of the submits that follow
  FactorTable table;
  std::unique_ptr<Batch> batch;
  Loop loop;
};

TokenIds prompt_of(std::size_t length) {
  TokenIds ids;
  for (std::size_t i = 0; i < length; ++i) ids.push_back(static_cast<std::int64_t>(1 + (i * 37 + length * 11) % 319));
  return ids;
}

TokenIds alone(const TokenIds& prompt, Mode mode, std::int64_t max_new_tokens) {
  const Generate generate{.max_new_tokens = max_new_tokens, .sampling = Sampling{.ignore_eos = true}};
  return runtime().generate(std::span(&prompt, 1), generate, {.mode = mode})[0].token_ids;
}

}  // namespace

TEST(Loop, ACancelledRowIsGoneWithinOneIteration) {
  for (std::size_t place = 0; place < 4; ++place) {  // running, being read, or waiting; whoever follows takes the place
    Bench bench;
    std::vector<Stream> streams;
    for (const std::size_t length : {3, 5, 28, 4}) streams.push_back(bench.submit(prompt_of(length)));
    for (int i = 0; i < 3; ++i) bench.iterate();
    ASSERT_EQ(bench.batch->ready(), 2U);
    ASSERT_EQ(bench.loop.waiting().size(), 1U);
    streams[place].cancel();
    const Iteration iteration = bench.iterate();
    ASSERT_EQ(iteration.finished.size(), 1U);
    EXPECT_EQ(iteration.finished[0].finish_reason, FinishReason::cancelled);
    EXPECT_TRUE(streams[place].done());
    EXPECT_EQ(bench.batch->members().size(), 3U);
    bench.run();
    for (std::size_t i = 0; i < 4; ++i) {
      if (i == place) continue;
      EXPECT_EQ(streams[i].result()[0].token_ids, alone(streams[i].prompts()[0], Mode::none, 20));
    }
  }
}

TEST(Loop, TheGapBetweenTwoTokensIsOneChunkAndOneStep) {
  Bench bench;
  const Stream running = bench.submit(prompt_of(4), Mode::none, 40);
  bench.iterate();
  std::size_t read = 0;
  for (const std::size_t length : {28, 3, 25, 20, 1}) bench.submit(prompt_of(length), Mode::none, 3);
  while (!running.done()) {
    const Iteration iteration = bench.iterate();
    EXPECT_LE(iteration.prefilled_tokens, 8U);
    EXPECT_GE(iteration.rows, 1U);
    read += iteration.prefilled_tokens;
  }
  EXPECT_EQ(read, 27U + 2U + 24U + 19U);
}

TEST(Loop, PromptsAreReadTogetherWhereThatSavesTime) {
  const auto joined_of = [](std::vector<std::size_t> lengths, std::size_t chunk) { return joined(lengths, chunk); };
  EXPECT_EQ(joined_of({}, 8), 0U);
  EXPECT_EQ(joined_of({40}, 8), 1U);
  EXPECT_EQ(joined_of({40, 2}, 8), 1U);
  EXPECT_EQ(joined_of({4, 4, 2}, 8), 2U);
  EXPECT_EQ(joined_of({2, 2, 3}, 8), 2U);  // three rows of 3 are 9
  EXPECT_EQ(joined_of({2, 1, 2}, 8), 1U);  // a single token is read as by a step
  EXPECT_EQ(joined_of({1, 2}, 8), 1U);
  EXPECT_EQ(joined_of({40, 8}, 128), 2U);  // as much padding as a call is worth
  EXPECT_EQ(joined_of({40, 7}, 128), 1U);
  EXPECT_EQ(joined_of({40, 24, 24}, 128), 3U);
}

TEST(Loop, PromptsThatAreReadTogetherAreAsIfAlone) {
  Bench bench;
  const std::vector<Mode> modes = {Mode::request, Mode::none, Mode::centroid};
  std::vector<Stream> streams;
  for (std::size_t i = 0; i < modes.size(); ++i) streams.push_back(bench.submit(prompt_of(5 - i), modes[i]));
  EXPECT_EQ(bench.iterate().prefilled_tokens, 4U + 3U);  // the third would be beyond the chunk of 8
  EXPECT_EQ(bench.batch->ready(), 2U);
  bench.run();
  for (std::size_t i = 0; i < modes.size(); ++i) {
    EXPECT_EQ(streams[i].result()[0].token_ids, alone(streams[i].prompts()[0], modes[i], 20));
  }
}

TEST(Loop, APrefillThatFailsEndsTheRowsInIt) {
  Bench bench;
  const std::vector<Stream> inside = {bench.submit(prompt_of(5)), bench.submit(prompt_of(4))};
  static const TokenIds outside_the_vocabulary(4, 1'000'000);
  bench.loop.waiting().back()->prompt->ids = outside_the_vocabulary;
  const Stream outside = bench.submit(prompt_of(3));
  bench.run();
  for (const Stream& stream : inside) {
    ASSERT_TRUE(stream.result()[0].error.has_value());
    EXPECT_STREQ(stream.result()[0].error->code(), RequestError::code_word);
  }
  EXPECT_EQ(outside.result()[0].token_ids, alone(outside.prompts()[0], Mode::none, 20));
}

TEST(Loop, DraftsSaveStepsOfASingleRowAndChangeNoToken) {
  const TokenIds repeating = {7, 8, 9, 10, 7, 8, 9, 10, 7, 8};
  std::vector<std::size_t> steps;
  for (const std::int64_t draft_tokens : {0, 4}) {
    Bench bench;
    bench.draft_tokens = draft_tokens;
    const Stream row = bench.submit(repeating, Mode::centroid, 36);
    Stream other = row;
    std::size_t& count = steps.emplace_back(0);
    for (; !bench.loop.empty(); ++count) {
      if (count == 5) other = bench.submit(prompt_of(9), Mode::request, 6);  // plain steps while there are two
      bench.iterate();
    }
    EXPECT_EQ(row.result()[0].token_ids, alone(repeating, Mode::centroid, 36));
    EXPECT_EQ(other.result()[0].token_ids, alone(other.prompts()[0], Mode::request, 6));
    EXPECT_EQ(bench.batch->cached_tokens(), 0U);
  }
  EXPECT_LT(steps[1], steps[0]);
}

TEST(Loop, NobodyStarves) {
  // One factor set at a time, and requests of the resident one keep coming.
  Bench bench(shared_decoder(), 2, 1);
  bench.submit(prompt_of(3), Mode::none, 10);
  bench.iterate();
  const Stream waiting = bench.submit(prompt_of(4), Mode::request, 2);
  for (int i = 0; i < 400 && !waiting.done(); ++i) {
    bench.submit(prompt_of(3), Mode::none, 10);
    bench.iterate();
  }
  EXPECT_TRUE(waiting.done());
}

TEST(Loop, ADecoderWithoutSlotsRunsStaticBatches) {
  const Device decoder;
  Bench bench(decoder);
  std::vector<Stream> streams;
  const std::vector<Mode> modes = {Mode::request, Mode::none, Mode::centroid, Mode::request, Mode::none};
  for (std::size_t i = 0; i < modes.size(); ++i) {
    streams.push_back(bench.submit(prompt_of(3 + 5 * i), modes[i], static_cast<std::int64_t>(4 + 3 * i)));
  }
  bench.iterate();
  EXPECT_EQ(bench.batch->room(), 0U);
  EXPECT_EQ(bench.batch->cached_tokens(), 3U + 8U + 13U);
  bench.run();
  for (std::size_t i = 0; i < modes.size(); ++i) {
    EXPECT_EQ(streams[i].result()[0].token_ids,
              alone(streams[i].prompts()[0], modes[i], static_cast<std::int64_t>(4 + 3 * i)));
  }
}

TEST(Loop, AStepThatFailsEndsTheRowsInIt) {
  Device decoder;
  Bench bench(decoder, 2);
  const std::vector<Stream> inside = {bench.submit(prompt_of(3)), bench.submit(prompt_of(5))};
  const Stream outside = bench.submit(prompt_of(4));
  bench.iterate();
  decoder.fails = true;
  bench.iterate();
  decoder.fails = false;
  for (const Stream& stream : inside) {
    const Generation generation = stream.result()[0];
    EXPECT_EQ(generation.finish_reason, FinishReason::error);
    ASSERT_TRUE(generation.error.has_value());
    EXPECT_STREQ(generation.error->code(), RequestError::code_word);
    EXPECT_EQ(generation.token_ids.size(), 1U);
  }
  bench.run();
  EXPECT_EQ(outside.result()[0].token_ids, alone(outside.prompts()[0], Mode::none, 20));
  EXPECT_EQ(bench.table.size(), 0U);
}

TEST(Loop, FactorsThatCannotBeMadeEndTheirOwnRow) {
  Bench bench;
  const Stream good = bench.submit(prompt_of(3), Mode::request, 5);
  const Stream bad = bench.submit(prompt_of(4), Mode::request, 5);
  const auto& member = bench.loop.waiting().back();
  member->source.make = [make = member->source.make] {
    static const std::vector<float> infinite(1000, INFINITY);
    FactorSets sets = make();
    for (auto& [name, values] : sets.tensors) values = std::span(infinite).first(values.size());
    return sets;
  };
  bench.run();
  EXPECT_STREQ(bad.result()[0].error->code(), NumericError::code_word);
  EXPECT_EQ(good.result()[0].token_ids, alone(good.prompts()[0], Mode::request, 5));
}

TEST(Loop, AFaultOfTheEngineItselfLeavesNobodyWaiting) {
  Bench bench(shared_decoder(), 2);
  std::vector<Stream> streams;
  for (int i = 0; i < 5; ++i) streams.push_back(bench.submit(prompt_of(5)));
  bench.iterate();
  for (const auto& [stream, token] : bench.loop.fail(RequestError("the engine failed")).tokens) stream->deliver(token);
  for (const Stream& stream : streams) {
    ASSERT_TRUE(stream.done());
    EXPECT_STREQ(stream.result()[0].error->code(), RequestError::code_word);
  }
}

TEST(Loop, FactorSetsOfDifferentRanksShareAStack) {
  FactorTable table(3);
  const auto source = [](const std::string& key, std::int64_t rank, float value) {
    static std::vector<std::vector<float>> memory;
    memory.reserve(100);
    const auto& values = memory.emplace_back(static_cast<std::size_t>(rank) * 2, value);
    return FactorSource{key, [&values, rank] { return FactorSets{1, rank, {{"lora_A", values}}, nullptr}; }};
  };
  const auto values = [&] {
    const auto found = table.sets().tensors.at("lora_A");
    return std::vector<float>(found.begin(), found.end());
  };
  table.acquire(source("a", 1, 1));
  table.acquire(source("b", 2, 2));
  table.acquire(source("a", 1, 1));
  EXPECT_EQ(table.size(), 2U);
  EXPECT_EQ(table.sets().rank, 2);
  EXPECT_EQ(values(), (std::vector<float>{1, 1, 0, 0, 2, 2, 2, 2}));
  table.acquire(source("c", 1, 3));
  EXPECT_TRUE(table.is_full());
  table.release("a");
  EXPECT_EQ(table.size(), 3U);
  table.release("a");  // the last set takes its place
  EXPECT_EQ(values(), (std::vector<float>{3, 3, 0, 0, 2, 2, 2, 2}));
  EXPECT_EQ(table.index("c"), 0U);
  table.release("b");
  EXPECT_EQ(table.sets().rank, 1);
  EXPECT_EQ(values(), (std::vector<float>{3, 3}));
  // Neither a smaller rank nor a larger one takes new memory: a decoder's calls keep the stack they were bound to.
  const float* const memory = table.sets().tensors.at("lora_A").data();
  table.acquire(source("d", 2, 4));
  EXPECT_EQ(values(), (std::vector<float>{3, 3, 0, 0, 4, 4, 4, 4}));
  EXPECT_EQ(table.sets().tensors.at("lora_A").data(), memory);
}

TEST(Loop, AStackUpdatesNothingAsLongAsNoneOfItsSetsDoes) {
  FactorTable table(3);
  static const std::vector<float> memory(2);
  const auto source = [](const std::string& key, bool updates_nothing) {
    return FactorSource{key,
                        [updates_nothing] { return FactorSets{1, 1, {{"lora_A", memory}}, nullptr, updates_nothing}; }};
  };
  table.acquire(source("none", true));
  EXPECT_TRUE(table.sets().updates_nothing);
  table.acquire(source("a", false));
  table.acquire(source("none too", true));
  EXPECT_FALSE(table.sets().updates_nothing);
  EXPECT_FALSE(table.set_of("a").sets.updates_nothing);
  EXPECT_TRUE(table.set_of("none too").sets.updates_nothing);
  table.release("none");  // the last set takes its place
  EXPECT_FALSE(table.sets().updates_nothing);
  table.release("a");
  EXPECT_TRUE(table.sets().updates_nothing);
}

}  // namespace chameleon::test::loop_test
