// Many threads on one runtime: results equal the serial ones.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <latch>
#include <thread>

#include "shared_data.h"

namespace chameleon::test::concurrency_test {

namespace {

/// Ragged batches in every mode, greedy and sampled.
std::vector<Call> make_work(const ModelSpec& model) {
  std::vector<Call> work;
  for (const Json& golden : read_data("golden.json")) {
    if (golden.at("bundle") != "chameleon_masked" || !golden.at("rank").is_null()) continue;
    Call call(golden, model);
    call.generate.max_new_tokens = 4;
    work.push_back(call);
    work.back().generate.sampling = Sampling{};
    work.push_back(call);
  }
  return work;
}

std::string run(const Runtime& runtime, const Call& call) {
  Json result;
  for (const Generation& generation : runtime.generate(call.prompts, call.generate, call.adapt)) {
    result.push_back({generation.token_ids, generation.text, generation.cluster_id});
  }
  for (const Score& score : runtime.score(call.prompts, call.adapt)) result.push_back(score.token_logprobs);
  return result.dump();
}

std::size_t env(const char* name, std::size_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::stoul(value) : otherwise;
}

}  // namespace

TEST(Concurrency, ResultsEqualTheSerialOnes) {
  const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  const std::vector<Call> work = make_work(runtime.manifest().model);
  std::vector<std::string> serial;
  for (const Call& one : work) serial.push_back(run(runtime, one));
  const std::size_t threads = env("CHAMELEON_THREADS", 16), requests = env("CHAMELEON_REQUESTS", 800);
  std::atomic<std::size_t> next = 0, wrong = 0;
  {
    std::vector<std::jthread> pool;
    for (std::size_t i = 0; i < threads; ++i) {
      pool.emplace_back([&] {
        for (std::size_t n = next++; n < requests; n = next++) {
          const std::size_t which = n % work.size();
          if (run(runtime, work[which]) != serial[which]) ++wrong;
        }
      });
    }
  }
  EXPECT_EQ(wrong, 0U);
}

TEST(Concurrency, TheFirstUseOfCentroidFactorsFromManyThreads) {
  const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  const std::vector<TokenIds> rows = {{5, 6, 7}};
  constexpr std::ptrdiff_t kThreads = 8;
  std::latch start(kThreads);
  std::vector<Adaptation> found(kThreads);
  {
    std::vector<std::jthread> pool;
    for (Adaptation& adaptation : found) {
      pool.emplace_back([&] {
        start.arrive_and_wait();
        adaptation = runtime.adapt(rows, {.mode = Mode::centroid});
      });
    }
  }
  for (const Adaptation& adaptation : found) {
    EXPECT_TRUE(std::ranges::equal(lora_B_of(adaptation), lora_B_of(found[0])));
  }
}

TEST(Concurrency, DescriptionsThatAreRememberedAndForgotten) {
  const Runtime runtime(good_bundle("chameleon_given"), {.threads = 1});
  const std::vector<TokenIds> rows = {{5, 6, 7}};
  constexpr std::size_t kDescriptions = 300;  // more than are remembered
  constexpr std::array words = {"answer", "like", "a", "lawyer", "the", "court", "finds"};
  const auto factors = [&](std::size_t i) {
    std::string description;
    for (std::size_t rest = i; description.empty() || rest > 0; rest /= words.size()) {
      description += words[rest % words.size()] + std::string(" ");
    }
    const Adaptation adaptation = runtime.adapt(rows, {.adapt_text = description});
    const std::span<const float> lora_B = lora_B_of(adaptation);
    return std::vector(lora_B.begin(), lora_B.end());
  };
  std::vector<std::vector<float>> serial;
  for (std::size_t i = 0; i < kDescriptions; ++i) serial.push_back(factors(i));
  EXPECT_NE(serial[0], serial[1]);
  std::atomic<std::size_t> wrong = 0;
  {
    std::vector<std::jthread> pool;
    for (std::size_t thread = 0; thread < 8; ++thread) {
      pool.emplace_back([&, thread] {
        for (std::size_t n = 0; n < 100; ++n) {
          const std::size_t i = (7 * n + 31 * thread) % kDescriptions;
          if (factors(i) != serial[i]) ++wrong;
        }
      });
    }
  }
  EXPECT_EQ(wrong, 0U);
}

TEST(Concurrency, CancelledAndFailingRequestsLeaveOthersAlone) {
  const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  const std::vector<Call> work = make_work(runtime.manifest().model);
  std::vector<std::string> serial;
  for (const Call& one : work) serial.push_back(run(runtime, one));
  std::atomic<bool> done = false;
  std::atomic<std::size_t> disturbed = 0;
  {
    std::jthread cancelling([&] {
      while (!done) {
        std::stop_source source;
        std::jthread killer([&] { source.request_stop(); });
        runtime.generate(work[0].prompts, {.max_new_tokens = 40}, work[0].adapt, OnError::raise, source.get_token());
        ++disturbed;
      }
    });
    std::jthread failing([&] {
      const std::vector<float> lora_A(16, 3e38F), lora_B(320, 3e38F);
      const Adapt adapt{.mode = Mode::static_, .factors = head_factors(1, lora_A, lora_B)};
      while (!done) {
        EXPECT_THROW(runtime.generate(work[0].prompts, {}, adapt), NumericError);
        ++disturbed;
      }
    });
    for (std::size_t round = 0; round < 5; ++round) {
      for (std::size_t i = 0; i < work.size(); ++i) EXPECT_EQ(run(runtime, work[i]), serial[i]);
    }
    done = true;
  }
  EXPECT_GT(disturbed, 0U);
}

}  // namespace chameleon::test::concurrency_test
