// chameleon-run from the shell.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "shared_data.h"

namespace chameleon::test::program_test {

namespace {

struct Result {
  int exit_code;
  std::string output;  // both streams
};

Result run(const std::string& arguments) {
  FILE* pipe = popen((std::string(CHAMELEON_RUN) + " " + arguments + " 2>&1").c_str(), "r");
  Result result;
  std::array<char, 4096> buffer;
  while (const std::size_t count = fread(buffer.data(), 1, buffer.size(), pipe))
    result.output.append(buffer.data(), count);
  result.exit_code = WEXITSTATUS(pclose(pipe));
  return result;
}

std::string bundle() { return good_bundle("chameleon_masked").string(); }

std::string file_with(const std::string& name, const std::string& content) {
  const auto path = std::filesystem::path(testing::TempDir()) / name;
  std::ofstream(path, std::ios::binary) << content;
  return path.string();
}

std::vector<Json> lines(const std::string& output) {
  std::vector<Json> records;
  std::istringstream stream(output);
  for (std::string line; std::getline(stream, line);) records.push_back(Json::parse(line));
  return records;
}

}  // namespace

TEST(Program, GenerateWritesJsonLines) {
  const Result result = run("generate " + bundle() + " --prompt 'The river' --prompt=def --max-new-tokens 5 --json");
  ASSERT_EQ(result.exit_code, 0) << result.output;
  const Runtime runtime(bundle());
  const std::vector<std::string> prompts = {"The river", "def"};
  const auto expected = runtime.generate(prompts, {.max_new_tokens = 5});
  const auto records = lines(result.output);
  ASSERT_EQ(records.size(), 2U);
  for (std::size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].at("token_ids").get<TokenIds>(), expected[i].token_ids);
    EXPECT_EQ(records[i].at("text"), expected[i].text);
    EXPECT_EQ(records[i].at("cluster_id"), expected[i].cluster_id);
    EXPECT_EQ(records[i].at("finish_reason"), to_string(expected[i].finish_reason));
  }
}

TEST(Program, GenerateReportsLogProbabilities) {
  const Result result = run("generate " + bundle() +
                            " --prompt 'The river' --max-new-tokens 5 --json --logprobs 2 --presence-penalty 1.5 "
                            "--frequency-penalty 0.5 --logit-bias 7=2.5 --logit-bias 8=-100");
  ASSERT_EQ(result.exit_code, 0) << result.output;
  const std::vector<std::string> prompts = {"The river"};
  const Sampling sampling{
      .presence_penalty = 1.5, .frequency_penalty = 0.5, .logit_bias = {{7, 2.5}, {8, -100}}, .logprobs = 2};
  std::vector<float> told;
  const auto on_token = [&](const Token& token) {
    told.push_back(token.logprob.value());
    EXPECT_EQ(token.top_logprobs.size(), 2U);
    return true;
  };
  const Generation expected =
      Runtime(bundle()).stream(prompts, on_token, {.max_new_tokens = 5, .sampling = sampling}).front();
  EXPECT_EQ(told, expected.token_logprobs);
  const Json record = lines(result.output).front();
  EXPECT_EQ(record.at("token_ids").get<TokenIds>(), expected.token_ids);
  EXPECT_EQ(record.at("token_logprobs").get<std::vector<float>>(), expected.token_logprobs);
  for (std::size_t place = 0; place < 5; ++place) {
    const Json& alternatives = record.at("top_logprobs").at(place);
    ASSERT_EQ(alternatives.size(), 2U);
    EXPECT_EQ(alternatives[1].at(0), expected.top_logprobs[place][1].token_id);
    EXPECT_EQ(alternatives[1].at(1).get<float>(), expected.top_logprobs[place][1].logprob);
  }
}

TEST(Program, SaysWhichProviderItTook) {
  const Result taken = run("generate " + bundle() + " --prompt x --provider auto --json");
  EXPECT_EQ(taken.exit_code, 0) << taken.output;
  EXPECT_NE(taken.output.find("provider: "), std::string::npos) << taken.output;
  const Result missing = run("generate " + bundle() + " --prompt x --provider cuda");
  EXPECT_EQ(missing.exit_code, 2);
  EXPECT_NE(missing.output.find("provider_unavailable"), std::string::npos) << missing.output;
}

TEST(Program, ScoreReadsParagraphsAndJsonLines) {
  const std::string paragraphs = file_with("texts.txt", "\nOne text.\nStill it.\n \t\nAnother.\r\n\r\n\n\nT\n");
  const std::string json_lines =
      file_with("texts.jsonl", "{\"text\": \"A\\u2028b\"}\n\n{\"text\": \"c d\", \"x\": 1}\n");
  const Result result =
      run("score " + bundle() + " --text " + paragraphs + " --text " + json_lines + " --batch-size 2 --json");
  ASSERT_EQ(result.exit_code, 0) << result.output;
  const Runtime runtime(bundle());
  const std::vector<std::string> texts = {"One text.\nStill it.", "Another.", "T",
                                          "A\xE2\x80\xA8"
                                          "b",
                                          "c d"};
  const auto ids = runtime.encode(texts);
  const auto records = lines(result.output);
  ASSERT_EQ(records.size(), texts.size());
  for (std::size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].at("token_ids").get<TokenIds>(), ids[i]);
    EXPECT_EQ(records[i].at("token_logprobs").size() + 1, ids[i].size());
  }
  EXPECT_TRUE(records[2].at("perplexity").is_null());
}

TEST(Program, AMistakeIsOneLineAndExitCodeTwo) {
  const std::string no_text = file_with("none.txt", " \n\n");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"generate " + bundle(), "input_invalid"},
      {"generate /nowhere --prompt x", "bundle_not_found"},
      {"generate " + std::string(5000, 'x') + " --prompt x", "bundle_not_found"},
      {"generate " + bundle() + " --prompt x --mode nonsense", "mode_unavailable"},
      {"generate " + bundle() + " --prompt x --max-new-tokens many", "usage"},
      {"generate " + bundle() + " --prompt x --max-new-tokens 0", "usage"},
      {"generate " + bundle() + " --prompt x --surprise 1", "usage"},
      {"generate " + bundle() + " --prompt", "usage"},
      {"generate --prompt x", "usage"},
      {"generate " + bundle() + " --prompt x --temperature -1", "input_invalid"},
      {"generate " + bundle() + " --prompt x --logit-bias 7", "usage"},
      {"generate " + bundle() + " --prompt x --logit-bias 320=1", "token_invalid"},
      {"generate " + bundle() + " --prompt x --logprobs 21", "input_invalid"},
      {"generate " + bundle() + " --prompt x --provider cuda", "provider_unavailable"},
      {"generate " + bundle() + " --prompt \"$(printf '\\377')\"", "input_invalid"},
      {"score " + bundle() + " --text /nowhere", "input_invalid"},
      {"score " + bundle() + " --text " + no_text, "input_invalid"},
      {"score " + bundle() + " --text " + file_with("bad.txt", "\xff"), "input_invalid"},
      {"score " + bundle() + " --text " + file_with("bad.jsonl", "{\"txt\": 1}\n"), "input_invalid"},
      {"score " + bundle() + " --text " + file_with("empty.jsonl", "{\"text\": \"\"}\n"), "input_invalid"},
      {"", "usage"},
      {"train", "usage"},
  };
  for (const auto& [arguments, code] : cases) {
    const Result result = run(arguments);
    EXPECT_EQ(result.exit_code, 2) << arguments;
    EXPECT_EQ(std::ranges::count(result.output, '\n'), 1) << result.output;
    EXPECT_TRUE(result.output.starts_with("error: ") && result.output.ends_with("[" + code + "]\n")) << result.output;
  }
}

}  // namespace chameleon::test::program_test
