// Results of the Python runtime for ragged batches in every mode, and of the Python engine for schedules of requests.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>

#include "sampling.h"
#include "schedules.h"
#include "shared_data.h"

namespace chameleon::test::golden_test {

namespace {

// Kernels of other processors may add in another order; tokens and embeddings must be equal.
constexpr float kTolerance = 2e-5F;

const Runtime& runtime_of(const std::string& name) {
  static std::map<std::string, Runtime> runtimes;
  auto found = runtimes.find(name);
  if (found == runtimes.end()) found = runtimes.emplace(name, Runtime(good_bundle(name))).first;
  return found->second;
}

void expect_generations(const std::vector<Generation>& actual, const Json& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    EXPECT_EQ(actual[i].token_ids, expected[i].at("token_ids").get<TokenIds>());
    EXPECT_EQ(actual[i].text, expected[i].at("text").get<std::string>());
    EXPECT_EQ(actual[i].cluster_id, expected[i].at("cluster_id").get<std::int64_t>());
    EXPECT_EQ(to_string(actual[i].finish_reason), expected[i].at("finish_reason").get<std::string>());
  }
}

}  // namespace

class Golden : public testing::TestWithParam<Json> {};

TEST_P(Golden, Agrees) {
  const Json& expected = GetParam();
  const Runtime& runtime = runtime_of(expected.at("bundle"));
  const Call given(expected, runtime.manifest().model);

  const Adaptation adaptation = runtime.adapt(given.prompts, given.adapt);
  EXPECT_EQ(adaptation.cluster_ids, expected.at("cluster_ids").get<TokenIds>());
  EXPECT_EQ(adaptation.factors.factor_ids, expected.at("factor_ids").get<TokenIds>());
  std::vector<float> embeddings;
  for (const Json& row : expected.at("embeddings")) {
    for (const Json& value : row) embeddings.push_back(value.get<float>());
  }
  EXPECT_EQ(adaptation.embeddings, embeddings);
  const Json& first = expected.at("lora_B_first");
  ASSERT_EQ(adaptation.factors.sets.count, static_cast<std::int64_t>(first.size()));
  const std::span<const float> lora_B = lora_B_of(adaptation);
  const std::size_t stride = lora_B.size() / first.size();
  for (std::size_t set = 0; set < first.size(); ++set) {
    for (std::size_t i = 0; i < first[set].size(); ++i) {
      EXPECT_NEAR(lora_B[set * stride + i], first[set][i].get<float>(), kTolerance);
    }
  }

  const std::vector<Score> scores = runtime.score(given.prompts, given.adapt);
  for (std::size_t row = 0; row < scores.size(); ++row) {
    const auto logprobs = expected.at("token_logprobs")[row].get<std::vector<float>>();
    // Of a row with log-probabilities down to -1000, any one is a difference of numbers as large.
    float tolerance = kTolerance;
    for (const float logprob : logprobs) tolerance = std::max(tolerance, kTolerance * (1 + std::abs(logprob)));
    ASSERT_EQ(scores[row].token_logprobs.size(), logprobs.size());
    for (std::size_t i = 0; i < logprobs.size(); ++i) {
      EXPECT_NEAR(scores[row].token_logprobs[i], logprobs[i], tolerance);
    }
  }

  Generate greedy = given.generate;
  greedy.sampling = Sampling{};
  expect_generations(runtime.generate(given.prompts, greedy, given.adapt), expected.at("greedy"));
  Json stream = Json::array();
  const auto on_token = [&](const Token& token) {
    stream.push_back({token.row, token.token_id, token.text, token.generation != nullptr});
    return true;
  };
  expect_generations(runtime.stream(given.prompts, on_token, given.generate, given.adapt), expected.at("sampled"));
  EXPECT_EQ(stream, expected.at("stream"));
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden, testing::ValuesIn(read_data("golden.json").get<std::vector<Json>>()),
                         [](const auto& info) {
                           const std::string bundle = info.param.at("bundle");
                           const std::string mode = info.param.at("mode");
                           return bundle + "_" + mode + "_" + std::to_string(info.index);
                         });

TEST(Released, BundlesGiveWhatTheyGave) {
  const auto released = data_directory() / "released";
  for (const auto& version : std::filesystem::directory_iterator(released)) {
    const std::string name = "released/" + version.path().filename().string();
    for (const Json& answer : read_data(name + "/answers.json")) {
      Runtime runtime(version.path() / answer.at("bundle").get<std::string>(), {.threads = 1});
      const Json loaded = answer.value("load", Json::object());
      for (const auto& [adapter, file] : loaded.items()) {
        runtime.load_adapter(adapter, version.path() / file.get<std::string>());
      }
      const Call call(answer, runtime.manifest().model);
      const std::vector<Generation> generations = runtime.generate(call.prompts, call.generate, call.adapt);
      ASSERT_EQ(generations.size(), answer.at("token_ids").size());
      for (std::size_t row = 0; row < generations.size(); ++row) {
        EXPECT_EQ(generations[row].token_ids, answer.at("token_ids")[row].get<TokenIds>()) << answer;
      }
    }
  }
}

class Schedules : public testing::TestWithParam<Json> {};

TEST_P(Schedules, Agree) {
  const Json& expected = GetParam();
  const Runtime runtime(good_bundle(expected.at("bundle").get<std::string>()), {.threads = 1});
  const Json found = run_schedule(runtime, expected.at("schedule"));
  for (const char* part : {"rows", "tokens", "iterations"}) EXPECT_EQ(found.at(part), expected.at("result").at(part));
}

INSTANTIATE_TEST_SUITE_P(Cases, Schedules, testing::ValuesIn(read_data("schedules.json").get<std::vector<Json>>()),
                         [](const auto& info) { return std::to_string(info.index); });

TEST(Sampling, Uniform) {
  const Json cases = read_data("sampling.json");
  for (const Json& expected : cases.at("uniform")) {
    const std::uint64_t seed = std::stoull(expected.at("seed").get<std::string>());
    EXPECT_EQ(uniform(seed, expected.at("stream"), expected.at("step")), expected.at("u").get<double>());
  }
}

TEST(Sampling, Choose) {
  const Json cases = read_data("sampling.json");
  for (const Json& expected : cases.at("choose")) {
    const TokenCounts counts(expected.value("prompt", TokenIds()), expected.value("generated", TokenIds()));
    const Json& mask = expected.contains("allowed") ? expected.at("allowed") : Json();
    const auto allowed = std::make_unique<bool[]>(mask.size());
    std::ranges::copy(mask, allowed.get());
    EXPECT_EQ(
        choose(read_logits(expected), counts, read_sampling(expected), expected.at("u"), {allowed.get(), mask.size()}),
        expected.at("token_id").get<std::int64_t>())
        << expected;
  }
}

TEST(Sampling, LogProbabilities) {
  const Json cases = read_data("sampling.json");
  for (const Json& expected : cases.at("log_probabilities")) {
    const Choice choice = log_probabilities(read_logits(expected), expected.at("token_id"), expected.at("count"));
    EXPECT_EQ(choice.logprob, expected.at("logprob").get<float>());
    Json top = Json::array();
    for (const auto& [id, logprob] : choice.top_logprobs) top.push_back({id, static_cast<double>(logprob)});
    EXPECT_EQ(top, expected.at("top_logprobs"));
  }
}

TEST(Sampling, SettingsAtTheirLimits) {
  const Json data = read_data("sampling.json");
  for (const Json& each : data.at("settings")) {
    Json code;
    try {
      check(read_sampling(each.at("settings")), 4096);
    } catch (const Error& error) {
      code = error.code();
    }
    EXPECT_EQ(code, each.at("code")) << each.dump().substr(0, 200);
  }
}

TEST(Sampling, ATokenOfNoProbabilityIsNeitherChosenNorListed) {
  const std::vector<float> logits = {-std::numeric_limits<float>::infinity(), 3};
  for (const double u : {0.0, 0.5, 0.999}) {
    EXPECT_EQ(choose(logits, TokenCounts({}), {.temperature = 5}, u), 1);
  }
  EXPECT_EQ(log_probabilities(logits, 1, 5).top_logprobs, (std::vector<TokenLogprob>{{1, 0}}));
}

TEST(Sampling, AMaskThatAllowsNothing) {
  EXPECT_THROW((void)choose(std::vector<float>{0, 1}, TokenCounts({}), {}, 0, std::array{false, false}), InputError);
}

TEST(Sampling, ArgmaxIsNumpys) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::size_t size : {1, 2, 15, 16, 17, 40, 1000, 2100}) {
    std::vector<float> values(size, -infinity);
    EXPECT_EQ(argmax(values), 0U);
    for (std::size_t at = 0; at < size; ++at) {
      values.assign(size, 1);
      values[at] = 2;
      EXPECT_EQ(argmax(values), at);
      values.back() = 2;
      EXPECT_EQ(argmax(values), at);
      values[at] = nan;
      EXPECT_EQ(argmax(values), at);
      values.back() = nan;
      EXPECT_EQ(argmax(values), at);
    }
  }
}

TEST(Sampling, LogitsThatAreNotFinite) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {infinity, std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<float> logits = {0, bad, 1};
    EXPECT_THROW((void)choose(logits, TokenCounts({}), {}, 0), NumericError);
    EXPECT_THROW((void)choose(logits, TokenCounts({}), {}, 0, std::array{true, false, true}), NumericError);
    EXPECT_THROW((void)log_probabilities(logits, 0, 1), NumericError);
  }
  EXPECT_THROW((void)choose(std::vector<float>(3, -infinity), TokenCounts({}), {}, 0), NumericError);
}

TEST(Tokenizer, Golden) {
  const Tokenizer& tokenizer = runtime_of("chameleon_masked").tokenizer();
  const Json cases = read_data("tokenizer.json");
  for (const Json& expected : cases.at("encode")) {
    EXPECT_EQ(tokenizer.encode(expected.at("text").get<std::string>()), expected.at("token_ids").get<TokenIds>());
  }
  for (const Json& expected : cases.at("decode")) {
    EXPECT_EQ(tokenizer.decode(expected.at("token_ids").get<TokenIds>()), expected.at("text").get<std::string>());
  }
  for (const Json& invalid : cases.at("invalid")) {
    EXPECT_THROW((void)tokenizer.encode(from_base64(invalid.get<std::string>())), InputError);
  }
}

}  // namespace chameleon::test::golden_test
