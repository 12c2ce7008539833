// Adapters from files: the files that the Python tests load too, and rows that fail alone because of one.

#include "adapters.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <future>
#include <optional>
#include <thread>

#include "chameleon.h"
#include "chameleon/engine.h"
#include "shared_data.h"

namespace chameleon::test::adapters_test {

namespace {

const std::vector<TokenIds> kPrompts = {{5, 9, 301}, {17, 44}, {7}};

const Adapt kLegal{.adapters = std::vector<Blend>(kPrompts.size(), "legal")};

Json case_named(const std::string& name) {
  for (const Json& each : read_data("adapters.json")) {
    if (each.at("name") == name) return each;
  }
  throw std::out_of_range(name);
}

/// The bundle of a case of adapters.json, its file, and one with the same adapter of other signs.
struct AdapterCase {
  explicit AdapterCase(const Json& adapter_case) : bundle(adapter_case), file(bundle.path().string() + ".safetensors") {
    std::string bytes = from_base64(adapter_case.at("base64").get<std::string>());
    std::ofstream(file, std::ios::binary) << bytes;
    for (std::size_t i = 1; i <= 64 && 4 * i < bytes.size(); ++i) bytes[bytes.size() - 4 * i + 3] ^= '\x80';
    std::ofstream(other, std::ios::binary) << bytes;
  }
  ~AdapterCase() {
    std::filesystem::remove(file);
    std::filesystem::remove(other);
  }

  HostileBundle bundle;
  std::filesystem::path file, other = file.string() + ".other";
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
  EXPECT_THROW(runtime.load_adapter("legal", given.other), AdapterError);
  EXPECT_THROW(runtime.load_adapter("own", given.other, true), AdapterError);
  EXPECT_THROW(runtime.load_adapter("legal", "/nowhere", true), AdapterError);  // which replaces nothing
  EXPECT_EQ(runtime.adapters()[1].digest, list[1].digest);
  runtime.load_adapter("legal", given.other, true);
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
}

TEST(Adapters, InCAreListedAndReplacedInPlace) {
  const AdapterCase given(case_named("good"));
  chameleon_runtime* runtime = nullptr;
  ASSERT_EQ(chameleon_load(given.bundle.path().c_str(), nullptr, &runtime), nullptr);
  const auto refused = [](chameleon_error* error) {
    const std::string code = error == nullptr ? "" : chameleon_error_code(error);
    chameleon_error_free(error);
    return code;
  };
  const auto list = [&] {
    chameleon_adapters* found = nullptr;
    EXPECT_EQ(chameleon_list_adapters(runtime, &found), nullptr);
    return std::unique_ptr<chameleon_adapters, decltype(&chameleon_adapters_free)>(found, chameleon_adapters_free);
  };
  ASSERT_EQ(chameleon_load_adapter(runtime, "legal", given.file.c_str()), nullptr);
  ASSERT_EQ(chameleon_load_adapter(runtime, "later", given.file.c_str()), nullptr);

  // Two rows, one after the other, and while the first is in the middle, the adapter is replaced.
  chameleon_engine* engine = nullptr;
  std::map<std::string, std::size_t> ended;  // rows by adapter and tenant
  const auto count = [](const chameleon_finished_row* row, void* user) {
    auto& rows = *static_cast<std::map<std::string, std::size_t>*>(user);
    for (std::size_t i = 0; i < row->num_adapters; ++i) ++rows[std::string(row->adapters[i]) + "/" + row->tenant];
    EXPECT_STREQ(row->mode, "static");
    EXPECT_STREQ(row->finish_reason, "length");
    EXPECT_EQ(row->new_tokens, 20U);
    EXPECT_TRUE(0 <= row->queued && row->queued <= row->first_token && row->first_token <= row->seconds);
  };
  const chameleon_engine_options one_row{.rows = 1, .on_finished = count, .user = &ended};
  ASSERT_EQ(chameleon_engine_start(runtime, &one_row, &engine), nullptr);
  const char* const names[] = {"legal", "legal"};
  const chameleon_text texts[] = {{nullptr, 0, kPrompts[0].data(), kPrompts[0].size()},
                                  {nullptr, 0, kPrompts[1].data(), kPrompts[1].size()}};
  const chameleon_batch batch{.texts = texts, .num_texts = 2, .adapters = names};
  struct Pause {
    std::promise<void> begun, replaced;
    std::size_t tokens = 0;
  };
  const auto generated = [&](Pause* pause) {
    const chameleon_sampling sampling{.logprobs = 1};
    const chameleon_tenant tenant{.name = pause != nullptr ? "acme" : nullptr};
    chameleon_generate_options options{.sampling = &sampling, .num_samplings = 1, .tenant = &tenant};
    if (pause != nullptr) {
      options.user = pause;
      options.on_token = [](const chameleon_token*, void* user) {
        auto& own = *static_cast<Pause*>(user);
        if (own.tokens++ == 0) {
          own.begun.set_value();
          own.replaced.get_future().wait();
        }
        return 1;
      };
    }
    chameleon_stream* stream = nullptr;
    EXPECT_EQ(chameleon_engine_submit(engine, &batch, &options, &stream), nullptr);
    if (pause != nullptr) {
      pause->begun.get_future().wait();
      EXPECT_EQ(refused(chameleon_load_adapter(runtime, "legal", given.other.c_str())), "adapter_invalid");
      EXPECT_EQ(refused(chameleon_replace_adapter(runtime, "own", given.other.c_str())), "adapter_invalid");
      EXPECT_EQ(refused(chameleon_replace_adapter(runtime, "legal", "/nowhere")), "adapter_invalid");
      EXPECT_EQ(refused(chameleon_replace_adapter(runtime, "legal", given.other.c_str())), "");
      pause->replaced.set_value();
    }
    chameleon_generations* generations = nullptr;
    EXPECT_EQ(chameleon_stream_result(stream, &generations), nullptr);
    std::vector<std::vector<float>> rows;
    for (std::size_t row = 0; row < 2; ++row) {
      std::size_t count = 0;
      const float* logprobs = chameleon_generation_token_logprobs(generations, row, &count);
      rows.emplace_back(logprobs, logprobs + count);
    }
    chameleon_generations_free(generations);
    chameleon_stream_free(stream);
    return rows;
  };
  const auto before = generated(nullptr);
  const auto first = list();
  ASSERT_EQ(chameleon_adapters_count(first.get()), 3U);
  const chameleon_adapter_info own = chameleon_adapters_at(first.get(), 0),
                               legal = chameleon_adapters_at(first.get(), 1),
                               later = chameleon_adapters_at(first.get(), 2);
  EXPECT_STREQ(own.name, "own");
  EXPECT_EQ(own.digest, nullptr);
  EXPECT_STREQ(legal.name, "legal");
  EXPECT_EQ(legal.uses, 2U);
  EXPECT_STREQ(later.name, "later");
  EXPECT_EQ(later.uses, 0U);
  EXPECT_STREQ(legal.digest, later.digest);
  Pause pause;
  EXPECT_EQ(generated(&pause), before);  // the row that waited, too
  EXPECT_NE(generated(nullptr), before);
  chameleon_engine_free(engine);
  EXPECT_EQ(ended, (std::map<std::string, std::size_t>{{"legal/", 4}, {"legal/acme", 2}}));
  const auto second = list();
  ASSERT_EQ(chameleon_adapters_count(second.get()), 3U);
  EXPECT_STREQ(chameleon_adapters_at(second.get(), 1).name, "legal");
  EXPECT_STRNE(chameleon_adapters_at(second.get(), 1).digest, legal.digest);
  EXPECT_EQ(chameleon_adapters_at(second.get(), 1).uses, 2U);  // of the new one
  EXPECT_EQ(chameleon_unload_adapter(runtime, "later"), nullptr);
  chameleon_runtime_free(runtime);
  const Runtime same(given.bundle.path());
  const AdapterInfo expected = same.adapters()[0];
  EXPECT_EQ(own.rank, expected.rank);
  EXPECT_EQ(std::vector<std::string>(own.targets, own.targets + own.num_targets), expected.targets);
  EXPECT_EQ(own.size, expected.size);
  EXPECT_STREQ(later.name, "later");  // in a list that outlives adapter and runtime
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
  for (const std::filesystem::path& path :
       {link, std::filesystem::path("/dev/zero"), std::filesystem::path("/nowhere/legal.safetensors")}) {
    EXPECT_THROW(runtime.load_adapter("legal", path), AdapterError) << path;
  }
  EXPECT_THROW(runtime.load_adapter("legal", given.bundle.path()), CheckpointError);  // no directory of PEFT
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

TEST(Adapters, FactorsThatARowHoldsAreNotReadAgain) {
  const AdapterCase given(case_named("good")), later(case_named("of_another_rank"));
  const Bundle bundle = open_bundle(given.bundle.path());
  Adapters adapters(bundle, 1);
  adapters.load("legal", given.file, false);
  std::optional held = adapters.choose("legal", 1);
  adapters.load("code", later.file, false);  // "legal" leaves
  std::filesystem::remove(given.file);
  std::optional again = adapters.choose("legal", 1);
  EXPECT_EQ(again->source.make().owner, held->source.make().owner);
  adapters.load("code", later.file, true);
  held.reset();
  EXPECT_NO_THROW((void)adapters.choose("legal", 1));
  adapters.load("code", later.file, true);
  again.reset();
  EXPECT_THROW((void)adapters.choose("legal", 1), AdapterError);
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

}  // namespace chameleon::test::adapters_test
