// Adapters from files: the files that the Python tests load too, and rows that fail alone because of one.

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <thread>

#include "chameleon/engine.h"
#include "shared_data.h"

namespace chameleon::test {

namespace {

const std::vector<TokenIds> kPrompts = {{5, 9, 301}, {17, 44}, {7}};

const Adapt kLegal{.adapters = std::vector<Blend>(kPrompts.size(), "legal")};

Json case_named(const std::string& name) {
  for (const Json& each : read_data("adapters.json")) {
    if (each.at("name") == name) return each;
  }
  throw std::out_of_range(name);
}

/// The bundle of a case of adapters.json, and its file.
struct AdapterCase {
  explicit AdapterCase(const Json& adapter_case) : bundle(adapter_case), file(bundle.path().string() + ".safetensors") {
    std::ofstream(file, std::ios::binary) << from_base64(adapter_case.at("base64").get<std::string>());
  }
  ~AdapterCase() { std::filesystem::remove(file); }

  HostileBundle bundle;
  std::filesystem::path file;
};

std::vector<TokenIds> tokens(const Runtime& runtime, const std::vector<Blend>& adapters) {
  std::vector<TokenIds> rows;
  for (const Generation& row : runtime.generate(kPrompts, {}, {.adapters = adapters})) rows.push_back(row.token_ids);
  return rows;
}

}  // namespace

class AdapterFiles : public testing::TestWithParam<Json> {};

TEST_P(AdapterFiles, IsLoadedOrRefusedWithItsCode) {
  const AdapterCase given(GetParam());
  Runtime runtime(given.bundle.path());
  std::vector<std::string> names = runtime.adapter_names();
  try {
    runtime.load_adapter("legal", given.file);
    EXPECT_TRUE(GetParam().at("code").is_null());
    names.emplace_back("legal");
  } catch (const Error& error) {
    EXPECT_EQ(Json(error.code()), GetParam().at("code")) << error.what();
  }
  EXPECT_EQ(runtime.adapter_names(), names);
}

INSTANTIATE_TEST_SUITE_P(Corpus, AdapterFiles, testing::ValuesIn(read_data("adapters.json").get<std::vector<Json>>()),
                         [](const auto& info) { return info.param.at("name").template get<std::string>(); });

TEST(Adapters, AreLoadedUsedAndForgotten) {
  const AdapterCase given(case_named("good"));
  Runtime runtime(given.bundle.path());
  const auto own = tokens(runtime, {"own", {}, "own"});
  runtime.load_adapter("legal", given.file);
  EXPECT_THROW(runtime.load_adapter("legal", given.file), AdapterError);
  for (const char* name : {"", "a/b", "../legal", "a:b", "static"}) {
    EXPECT_THROW(runtime.load_adapter(name, given.file), InputError) << name;
  }
  const auto mixed = tokens(runtime, {"own", "legal", "own"});
  EXPECT_EQ(mixed[0], own[0]);
  EXPECT_NE(mixed[1], own[1]);
  runtime.unload_adapter("legal");
  EXPECT_THROW(runtime.unload_adapter("legal"), AdapterError);
  EXPECT_THROW(tokens(runtime, {"own", "legal", "own"}), AdapterError);
  EXPECT_THROW(runtime.unload_adapter("own"), AdapterError);
  EXPECT_EQ(tokens(runtime, {"own", {}, "own"}), own);
}

TEST(Adapters, AreListedAndReplacedInPlace) {
  const AdapterCase given(case_named("good"));
  const std::filesystem::path other = given.file.string() + ".other";
  {
    std::ifstream source(given.file, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(source), {}};
    for (std::size_t i = 1; i <= 64; ++i) bytes[bytes.size() - 4 * i + 3] ^= '\x80';  // other signs
    std::ofstream(other, std::ios::binary) << bytes;
  }
  Runtime runtime(given.bundle.path());
  runtime.load_adapter("legal", given.file);
  runtime.load_adapter("later", given.file);
  const auto list = runtime.adapters();
  ASSERT_EQ(runtime.adapter_names(), (std::vector<std::string>{"own", "legal", "later"}));
  EXPECT_EQ(list[0].digest, std::nullopt);
  EXPECT_EQ(list[1].digest, list[2].digest);
  EXPECT_EQ(list[1].digest->size(), 64U);
  EXPECT_GE(list[1].rank, 1);
  EXPECT_FALSE(list[1].targets.empty());
  EXPECT_GT(list[1].size, 0U);
  EXPECT_EQ(list[1].uses, 0U);
  const auto before = tokens(runtime, {"legal", "legal", Blend{{"legal", 1}, {"own", 1}}});
  EXPECT_EQ(runtime.adapters()[1].uses, 3U);
  Engine engine(runtime);
  const Generate generate;
  const std::vector<Blend> blends = {"legal", "legal", Blend{{"legal", 1}, {"own", 1}}};
  const Stream stream = engine.submit(kPrompts, generate, {.adapters = blends});
  EXPECT_THROW(runtime.load_adapter("legal", other), AdapterError);
  EXPECT_THROW(runtime.load_adapter("own", other, true), AdapterError);
  EXPECT_THROW(runtime.load_adapter("legal", "/nowhere", true), AdapterError);  // which replaces nothing
  EXPECT_EQ(runtime.adapters()[1].digest, list[1].digest);
  runtime.load_adapter("legal", other, true);
  const auto replaced = runtime.adapters();
  EXPECT_EQ(runtime.adapter_names(), (std::vector<std::string>{"own", "legal", "later"}));
  EXPECT_NE(replaced[1].digest, list[1].digest);
  EXPECT_EQ(replaced[1].uses, 0U);
  const auto found = stream.result();  // of the factors that it began with
  for (std::size_t row = 0; row < found.size(); ++row) EXPECT_EQ(found[row].token_ids, before[row]);
  EXPECT_EQ(tokens(runtime, {"later", "later", {}})[0], before[0]);
  const auto scored = [&](const char* name) {
    return runtime.score(kPrompts, {.adapters = std::vector<Blend>(kPrompts.size(), name)})[0].token_logprobs;
  };
  EXPECT_NE(scored("legal"), scored("later"));
  std::filesystem::remove(other);
}

TEST(Adapters, AreBlended) {
  const AdapterCase given(case_named("good"));
  Runtime runtime(given.bundle.path());
  runtime.load_adapter("legal", given.file);
  EXPECT_EQ(tokens(runtime, {Blend{{"legal", 1}}, Blend(std::map<std::string, float>{}), "own"}),
            tokens(runtime, {"legal", {}, "own"}));
  const Blend blend{{"legal", 0.5F}, {"own", -2}};
  const auto expected = tokens(runtime, {blend, blend, blend});
  EXPECT_NE(expected, tokens(runtime, {"legal", "legal", "legal"}));
  Engine engine(runtime);
  const Stream stream = engine.submit(kPrompts, {}, {.adapters = std::vector<Blend>(kPrompts.size(), blend)});
  runtime.unload_adapter("legal");  // its rows keep it
  const auto found = stream.result();
  for (std::size_t row = 0; row < found.size(); ++row) EXPECT_EQ(found[row].token_ids, expected[row]);
  EXPECT_THROW(tokens(runtime, {blend, {}, {}}), AdapterError);
  EXPECT_THROW(tokens(runtime, {Blend{{"own", INFINITY}}, {}, {}}), InputError);
}

TEST(Adapters, WhatIsNoPlainFileIsRefused) {
  const AdapterCase given(case_named("good"));
  Runtime runtime(given.bundle.path());
  const std::filesystem::path link = given.file.string() + ".link";
  std::filesystem::create_symlink(given.file, link);
  for (const std::filesystem::path& path : {link, given.bundle.path(), std::filesystem::path("/dev/zero"),
                                            std::filesystem::path("/nowhere/legal.safetensors")}) {
    EXPECT_THROW(runtime.load_adapter("legal", path), AdapterError) << path;
  }
  std::filesystem::remove(link);
}

TEST(Adapters, FactorsThatLeftTheMemoryAreReadAgain) {
  const AdapterCase given(case_named("good")), other(case_named("of_another_rank"));
  Runtime runtime(given.bundle.path(), {.max_adapter_bytes = 1});
  runtime.load_adapter("legal", given.file);
  const auto legal = tokens(runtime, {"legal", "legal", "legal"});
  runtime.load_adapter("code", other.file);  // the other one leaves
  EXPECT_EQ(tokens(runtime, {"legal", "code", "legal"})[0], legal[0]);
  runtime.load_adapter("last", other.file);
  std::filesystem::rename(other.file, given.file);
  EXPECT_THROW(tokens(runtime, {"legal", {}, {}}), AdapterError);
}

TEST(Adapters, AnEngineTakesThemByName) {
  const AdapterCase given(case_named("good"));
  Runtime runtime(given.bundle.path());
  runtime.load_adapter("legal", given.file);
  const auto expected = tokens(runtime, {"legal", "legal", "legal"});
  Engine engine(runtime);
  const Stream stream = engine.submit(kPrompts, {}, kLegal);
  runtime.unload_adapter("legal");  // its rows keep it
  const auto found = stream.result();
  for (std::size_t row = 0; row < found.size(); ++row) EXPECT_EQ(found[row].token_ids, expected[row]);
  EXPECT_THROW((void)engine.submit(kPrompts, {}, kLegal), AdapterError);
}

TEST(Concurrency, AdaptersComeAndGo) {
  const AdapterCase given(case_named("good"));
  Runtime runtime(given.bundle.path(), {.threads = 1, .max_adapter_bytes = 1});
  runtime.load_adapter("legal", given.file);
  const auto expected = tokens(runtime, {"own", {}, "legal"});
  const auto legal = tokens(runtime, {"legal", "legal", "legal"});
  Engine engine(runtime, {.rows = 4});
  const auto through_the_engine = [&] {
    std::vector<TokenIds> rows;
    for (const Generation& row : engine.submit(kPrompts, {}, kLegal).result()) rows.push_back(row.token_ids);
    return rows;
  };
  std::atomic<std::size_t> running = 4, wrong = 0;
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < running; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 8; ++j) {
        wrong += tokens(runtime, {"own", {}, "legal"}) != expected ? 1 : 0;
        wrong += through_the_engine() != legal ? 1 : 0;
      }
      --running;
    });
  }
  while (running > 0) {
    runtime.load_adapter("code", given.file);
    runtime.unload_adapter("code");
  }
  EXPECT_EQ(wrong, 0U);
}

TEST(Errors, OfOneRowEndItAlone) {
  const AdapterCase given(case_named("its_logits_overflow"));
  Runtime runtime(given.bundle.path());
  runtime.load_adapter("legal", given.file);
  const auto expected = tokens(runtime, {{}, {}, "own"});
  const Adapt adapt{.adapters = std::vector<Blend>{{}, "legal", "own"}};
  EXPECT_THROW(runtime.generate(kPrompts, {}, adapt), NumericError);
  std::size_t ends = 0;
  const auto on_token = [&](const Token& token) { return ends += token.generation != nullptr ? 1 : 0, true; };
  const auto found = runtime.stream(kPrompts, on_token, {}, adapt, OnError::row);
  EXPECT_EQ(ends, 3U);
  EXPECT_EQ(found[0].token_ids, expected[0]);
  EXPECT_EQ(found[2].token_ids, expected[2]);
  EXPECT_EQ(found[1].finish_reason, FinishReason::error);
  EXPECT_STREQ(found[1].error.value().code(), "not_finite");
  EXPECT_TRUE(found[1].token_ids.empty());
}

TEST(Errors, OfARowThatDraftsEndIt) {
  const AdapterCase given(case_named("its_logits_overflow"));
  Runtime runtime(given.bundle.path());
  runtime.load_adapter("legal", given.file);
  const Generate generate{.prompt_lookup_num_tokens = 4};
  const Adapt adapt{.adapters = std::vector<Blend>{"legal"}};
  const auto prompt = std::span(kPrompts).first(1);
  EXPECT_THROW(runtime.generate(prompt, generate, adapt), NumericError);
  EXPECT_EQ(runtime.generate(prompt, generate, adapt, OnError::row)[0].finish_reason, FinishReason::error);
}

}  // namespace chameleon::test
