// chameleon-run: generate and score from the shell, with the options and JSON lines of the Python commands.

#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "chameleon/runtime.h"
#include "program.h"
#include "texts.h"

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kHelp = R"(chameleon-run generate BUNDLE --prompt TEXT ... | --prompts FILE [options]
chameleon-run score    BUNDLE --text FILE ... [options]
chameleon-run inspect  BUNDLE [options]

  --mode MODE             none, static, centroid, request, cohort or tenant
  --tenant NAME           mode tenant: one per text, in order
  --adapter NAME          adapter of all texts, or one per text in order; A=0.7,B=0.3 is a blend, '' is the base model
  --load-adapter NAME=PATH  an adapter file or a PEFT directory, which texts then choose by its name; may be given
                          several times
  --adapt-text TEXT       mode request of a bundle with an encoder: what the task is, of all texts, or one per text in
                          order
  --provider NAME         cpu, tensorrt in a build that has it, or auto
  --threads N             threads of ONNX Runtime
  --trusted-key FILE      refuse a bundle that this Ed25519 public key (PEM) did not sign; may be given several times
  --json                  one JSON object per text and line; of inspect, one
generate:
  --prompt TEXT           a prompt; may be given several times
  --prompts FILE          prompts from a file: paragraphs, or .jsonl with "text"
  --max-new-tokens N      (20)
  --temperature X         0 is greedy (0)
  --top-k N               0 keeps all (0)
  --top-p X               1 keeps all (1)
  --repetition-penalty X  1 changes nothing (1)
  --presence-penalty X    subtracted from the logits of generated tokens (0)
  --frequency-penalty X   the same, as often as each was generated (0)
  --logit-bias ID=VALUE   added to a token's logit; may be given several times
  --logprobs N            with --json: log-probabilities, and those of 0 to 20 alternatives
  --seed N                the same seed gives the same tokens (0)
  --prompt-lookup-num-tokens N  fp32: draft up to N tokens of a single row from its text (0)
  --stop TEXT             stop before this string; may be given several times
score:
  --text FILE             texts from a file; may be given several times
  --batch-size N          texts per batch: what cohort and tenant adapt to (32)
)";

struct Arguments {
  std::filesystem::path bundle;
  std::vector<std::string> texts;
  std::optional<std::vector<std::string>> tenants;
  std::optional<std::vector<chameleon::Blend>> adapters;
  std::map<std::string, std::filesystem::path> loaded_adapters;
  std::optional<std::vector<std::string>> descriptions;
  chameleon::LoadOptions load;
  chameleon::Sampling sampling;
  std::int64_t max_new_tokens = 20;
  std::int64_t prompt_lookup_num_tokens = 0;
  std::int64_t batch_size = 32;
  bool json = false;
};

std::pair<std::int64_t, double> bias(const std::string& option, const std::string& text) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos) throw UsageError(option + " " + text + ": pass ID=VALUE");
  return {number<std::int64_t>(option, text.substr(0, equals)), number<double>(option, text.substr(equals + 1))};
}

std::pair<std::string, std::filesystem::path> named_path(const std::string& option, const std::string& text) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
    throw UsageError(option + " " + text + ": pass NAME=PATH");
  }
  return {text.substr(0, equals), text.substr(equals + 1)};
}

/// One for all texts becomes one for each. Throws InputError for another number.
template <class T>
void spread(std::optional<std::vector<T>>& values, std::size_t texts, const char* name) {
  if (!values) return;
  if (values->size() == 1) values->resize(texts, values->front());
  if (values->size() != texts) {
    throw chameleon::InputError(std::to_string(values->size()) + " " + name + " for " + std::to_string(texts) +
                                " texts: pass one, or one per text");
  }
}

Arguments parse(const std::string& command, const std::vector<std::string>& words) {
  Arguments parsed;
  Options options = {
      {"--mode", [&](auto&, auto& text) { parsed.load.mode = chameleon::parse_mode(text); }},
      {"--tenant",
       [&](auto&, auto& text) {
         if (!parsed.tenants) parsed.tenants.emplace();
         parsed.tenants->push_back(text);
       }},
      {"--adapter",
       [&](auto&, auto& text) {
         if (!parsed.adapters) parsed.adapters.emplace();
         parsed.adapters->push_back(chameleon::Blend::parse(text));
       }},
      {"--load-adapter",
       [&](auto& option, auto& text) {
         if (!parsed.loaded_adapters.insert(named_path(option, text)).second) {
           throw UsageError(option + ": two adapters have the same name");
         }
       }},
      {"--adapt-text",
       [&](auto&, auto& text) {
         if (!parsed.descriptions) parsed.descriptions.emplace();
         parsed.descriptions->push_back(text);
       }},
      {"--provider", [&](auto&, auto& text) { parsed.load.provider = text; }},
      {"--threads", [&](auto& option, auto& text) { parsed.load.threads = number<int>(option, text, 1); }},
      {"--trusted-key",
       [&](auto&, auto& text) {
         if (!parsed.load.trusted_keys) parsed.load.trusted_keys.emplace();
         parsed.load.trusted_keys->push_back(text);
       }},
  };
  const auto read_more = [&](auto&, auto& path) {
    for (std::string& text : read_texts(path)) parsed.texts.push_back(std::move(text));
  };
  chameleon::Sampling& sampling = parsed.sampling;
  if (command == "generate") {
    options.insert({
        {"--prompt", [&](auto&, auto& text) { parsed.texts.push_back(text); }},
        {"--prompts", read_more},
        {"--max-new-tokens",
         [&](auto& option, auto& text) { parsed.max_new_tokens = number<std::int64_t>(option, text, 1); }},
        {"--prompt-lookup-num-tokens",
         [&](auto& option, auto& text) { parsed.prompt_lookup_num_tokens = number<std::int64_t>(option, text); }},
        {"--temperature", [&](auto& option, auto& text) { sampling.temperature = number<double>(option, text); }},
        {"--top-k", [&](auto& option, auto& text) { sampling.top_k = number<std::int64_t>(option, text); }},
        {"--top-p", [&](auto& option, auto& text) { sampling.top_p = number<double>(option, text); }},
        {"--repetition-penalty",
         [&](auto& option, auto& text) { sampling.repetition_penalty = number<double>(option, text); }},
        {"--presence-penalty",
         [&](auto& option, auto& text) { sampling.presence_penalty = number<double>(option, text); }},
        {"--frequency-penalty",
         [&](auto& option, auto& text) { sampling.frequency_penalty = number<double>(option, text); }},
        {"--logit-bias", [&](auto& option, auto& text) { sampling.logit_bias.insert(bias(option, text)); }},
        {"--logprobs", [&](auto& option, auto& text) { sampling.logprobs = number<int>(option, text); }},
        {"--seed", [&](auto& option, auto& text) { sampling.seed = number<std::uint64_t>(option, text); }},
        {"--stop", [&](auto&, auto& text) { sampling.stop.push_back(text); }},
    });
  } else if (command == "score") {
    options.insert({
        {"--text", read_more},
        {"--batch-size", [&](auto& option, auto& text) { parsed.batch_size = number<std::int64_t>(option, text, 1); }},
    });
  }
  parsed.bundle = parse_words(words, options, {{"--json", parsed.json}});
  if (parsed.texts.empty() && command != "inspect") {
    throw chameleon::InputError(command == "generate" ? "nothing to continue: pass --prompt TEXT or --prompts FILE"
                                                      : "nothing to score: pass --text FILE");
  }
  spread(parsed.adapters, parsed.texts.size(), "adapters");
  spread(parsed.descriptions, parsed.texts.size(), "descriptions");
  return parsed;
}

void add_logprobs(Json& record, const chameleon::Generation& generation) {
  record["token_logprobs"] = std::vector<double>(generation.token_logprobs.begin(), generation.token_logprobs.end());
  Json& places = record["top_logprobs"] = Json::array();
  for (const auto& place : generation.top_logprobs) {
    Json alternatives = Json::array();
    for (const auto& [token_id, logprob] : place) alternatives.push_back({token_id, static_cast<double>(logprob)});
    places.push_back(alternatives);
  }
}

void generate(const chameleon::Runtime& runtime, const Arguments& arguments) {
  const chameleon::Generate how{.max_new_tokens = arguments.max_new_tokens,
                                .sampling = arguments.sampling,
                                .prompt_lookup_num_tokens = arguments.prompt_lookup_num_tokens};
  const chameleon::Adapt adapt{
      .tenants = arguments.tenants, .adapters = arguments.adapters, .adapt_text = arguments.descriptions};
  for (const chameleon::Generation& generation : runtime.generate(arguments.texts, how, adapt)) {
    const std::string_view reason = chameleon::to_string(generation.finish_reason);
    if (arguments.json) {
      Json record = {{"token_ids", generation.token_ids},
                     {"text", generation.text},
                     {"cluster_id", generation.cluster_id},
                     {"finish_reason", reason}};
      if (arguments.sampling.logprobs) add_logprobs(record, generation);
      std::cout << record.dump() << '\n';
    } else {
      std::cout << "cluster " << generation.cluster_id << ", " << reason << ": " << generation.text << '\n';
    }
  }
}

/// Those of a batch of texts; fewer where there are fewer values.
template <class T>
std::optional<std::vector<T>> part(const std::optional<std::vector<T>>& values, std::size_t start, std::size_t count) {
  if (!values) return std::nullopt;
  const std::size_t first = std::min(start, values->size()), last = std::min(start + count, values->size());
  return std::vector<T>(values->begin() + static_cast<std::ptrdiff_t>(first),
                        values->begin() + static_cast<std::ptrdiff_t>(last));
}

void score(const chameleon::Runtime& runtime, const Arguments& arguments) {
  const auto batch_size = static_cast<std::size_t>(arguments.batch_size);
  const std::span<const std::string> texts = arguments.texts;
  for (std::size_t start = 0; start < texts.size(); start += batch_size) {
    const std::size_t count = std::min(batch_size, texts.size() - start);
    const chameleon::Adapt adapt{.tenants = part(arguments.tenants, start, count),
                                 .adapters = part(arguments.adapters, start, count),
                                 .adapt_text = part(arguments.descriptions, start, count)};
    for (const chameleon::Score& row : runtime.score(texts.subspan(start, count), adapt)) {
      if (arguments.json) {
        const Json record = {
            {"token_ids", row.token_ids},
            {"token_logprobs", std::vector<double>(row.token_logprobs.begin(), row.token_logprobs.end())},
            {"cluster_id", row.cluster_id},
            {"logprob", row.logprob()},
            {"perplexity", row.token_logprobs.empty() ? Json() : Json(row.perplexity())}};
        std::cout << record.dump() << '\n';
      } else {
        std::cout << "cluster " << row.cluster_id << ", " << row.token_ids.size() << " tokens, log-probability "
                  << row.logprob() << ", perplexity " << row.perplexity() << '\n';
      }
    }
  }
}

void inspect(const chameleon::Runtime& runtime, const Arguments& arguments) {
  const auto& weights = runtime.integer_weights();
  if (arguments.json) {
    const Json record = {{"digest", runtime.bundle().digest},
                         {"precision", runtime.manifest().precision},
                         {"provider", runtime.provider()},
                         {"integer_weights", weights ? Json(*weights) : Json()}};
    std::cout << record.dump() << '\n';
  } else {
    std::cout << "bundle " << runtime.bundle().digest << ", precision " << runtime.manifest().precision << ", provider "
              << runtime.provider() << ", " << (weights ? *weights + " weights in" : "no") << " integer products\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  if (std::ranges::find(words, "--help") != words.end()) {
    std::cout << kHelp;
    return 0;
  }
  return run_program([&] {
    const std::string command = words.empty() ? "" : words.front();
    if (command != "generate" && command != "score" && command != "inspect") {
      throw UsageError("expected the command generate, score or inspect");
    }
    words.erase(words.begin());
    const Arguments arguments = parse(command, words);
    chameleon::Runtime runtime(arguments.bundle, arguments.load);
    if (arguments.load.provider == "auto") std::cerr << "provider: " << runtime.provider() << '\n';
    for (const auto& [name, path] : arguments.loaded_adapters) runtime.load_adapter(name, path);
    if (command == "inspect") return inspect(runtime, arguments);
    command == "generate" ? generate(runtime, arguments) : score(runtime, arguments);
  });
}
