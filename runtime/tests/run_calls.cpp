// Makes calls in every way: `chameleon_calls BUNDLE`, with one call on each line of standard input (see Call). Prints
// the token ids that generate, stream and an engine give its rows, or the error, one line for each call.
// tests/cpp/test_cpp_features.py compares them with Python's.

#include <iostream>

#include "chameleon/engine.h"
#include "shared_data.h"

namespace {

using namespace chameleon;
using chameleon::test::Call;
using chameleon::test::Json;

Json generated(const std::vector<Generation>& generations) {
  Json rows;
  for (const Generation& generation : generations) rows.push_back(generation.token_ids);
  return rows;
}

Json streamed(const Runtime& runtime, const Call& call) {
  std::vector<TokenIds> rows(call.prompts.size() * call.generate.n);
  const auto on_token = [&](const Token& token) {
    if (token.token_id >= 0) rows.at(token.row).push_back(token.token_id);
    return true;
  };
  runtime.stream(call.prompts, on_token, call.generate, call.adapt);
  return rows;
}

Json outcome(const auto& work) try { return work(); } catch (const Error& error) {
  return {{"code", error.code()}, {"message", error.what()}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: chameleon_calls BUNDLE\n";
    return 2;
  }
  const Runtime runtime(argv[1], {.threads = 1});
  Engine engine(runtime, {.rows = 4, .prefill_tokens = 8});
  for (std::string line; std::getline(std::cin, line);) {
    const Call call(Json::parse(line), runtime.manifest().model);
    const Json found = {
        {"generate", outcome([&] { return generated(runtime.generate(call.prompts, call.generate, call.adapt)); })},
        {"stream", outcome([&] { return streamed(runtime, call); })},
        {"engine",
         outcome([&] { return generated(engine.submit(call.prompts, call.generate, call.adapt).result()); })}};
    std::cout << found.dump() << std::endl;
  }
  return 0;
}
