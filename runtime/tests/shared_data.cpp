#include "shared_data.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "contract/mapped_file.h"

namespace chameleon::test {

namespace fs = std::filesystem;

namespace {

std::string read_file(const fs::path& path) { return std::string(MappedFile(path).text()); }

void write_file(const fs::path& path, const std::string& content) {
  // Removed first: the content may come from a mapping of the same file.
  fs::remove(path);
  std::ofstream(path, std::ios::binary) << content;
}

void set(Json& place, const Json& path, std::size_t depth, const Json* value) {
  const std::string key = path.at(depth);
  const bool last = depth + 1 == path.size();
  if (!last) return set(place.is_array() ? place.at(std::stoul(key)) : place.at(key), path, depth + 1, value);
  if (value == nullptr) {
    place.is_array() ? place.erase(std::stoul(key)) : static_cast<void>(place.erase(key));
  } else {
    (place.is_array() ? place.at(std::stoul(key)) : place[key]) = *value;
  }
}

void apply_change(const Json& change, const fs::path& bundle) {
  const std::string what = change.at("do");
  const fs::path file = bundle / change.value("file", "bundle.json");
  if (what == "write") {
    const std::string piece = from_base64(change.at("base64").get<std::string>());
    std::string content;
    for (int i = 0; i < change.at("times").get<int>(); ++i) content += piece;
    write_file(file, content);
  } else if (what == "append") {
    write_file(file, read_file(file) + change.at("text").get<std::string>());
  } else if (what == "truncate") {
    fs::resize_file(file, change.at("size").get<std::size_t>());
  } else if (what == "flip") {
    std::string content = read_file(file);
    content.at(change.at("offset").get<std::size_t>()) ^= 1;
    write_file(file, content);
  } else if (what == "delete") {
    fs::remove(file);
  } else if (what == "mkdir") {
    fs::create_directory(file);
  } else if (what == "symlink") {
    fs::create_symlink(change.at("target").get<std::string>(), file);
  } else if (what == "redigest") {
    Json manifest = Json::parse(read_file(bundle / "bundle.json"));
    manifest["files"][file.filename().string()] = {{"size", fs::file_size(file)},
                                                   {"sha256", sha256(MappedFile(file).bytes())}};
    write_file(bundle / "bundle.json", manifest.dump());
  } else if (what == "set" || what == "unset") {
    Json content = Json::parse(read_file(file));
    set(content, change.at("path"), 0, what == "set" ? &change.at("value") : nullptr);
    write_file(file, content.dump());
  } else {
    throw std::invalid_argument(what);
  }
}

/// Masks by the tokens of the row before them; others than were recorded are an error.
AllowedTokens recorded_masks(const Json& json) {
  const auto vocab_size = json.at("vocab_size").get<std::size_t>();
  const auto masks = std::make_shared<std::map<TokenIds, std::unique_ptr<bool[]>>>();
  for (const auto& [after, allowed] : json.at("masks").get<std::vector<std::pair<TokenIds, TokenIds>>>()) {
    auto& mask = (*masks)[after] = std::make_unique<bool[]>(vocab_size);
    for (const std::int64_t token_id : allowed) mask[static_cast<std::size_t>(token_id)] = true;
  }
  return [masks, vocab_size](std::span<const std::int64_t> token_ids) {
    const auto found = masks->find(TokenIds(token_ids.begin(), token_ids.end()));
    if (found == masks->end()) throw InputError("no mask was recorded here");
    return std::span<const bool>(found->second.get(), vocab_size);
  };
}

}  // namespace

fs::path data_directory() { return CHAMELEON_TEST_DATA; }
Json read_data(const std::string& name) { return Json::parse(read_file(data_directory() / name)); }
fs::path good_bundle(const std::string& name) { return data_directory() / "bundles" / name; }

std::string from_base64(std::string_view text) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  unsigned int bits = 0, count = 0;
  for (const char c : text.substr(0, text.find('='))) {
    bits = bits << 6 | static_cast<unsigned int>(digits.find(c));
    count += 6;
    if (count >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xFF);
  }
  return bytes;
}

HostileBundle::HostileBundle(const Json& hostile_case) {
  std::string name = (fs::temp_directory_path() / "chameleon-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = name;
  fs::copy(good_bundle(hostile_case.at("base").get<std::string>()), path_);
  for (const Json& change : hostile_case.at("changes")) apply_change(change, path_);
}

HostileBundle::~HostileBundle() { fs::remove_all(path_); }

Call::Call(const Json& record, const ModelSpec& model)
    : prompts(record.at(record.contains("rows") ? "rows" : "prompts").get<std::vector<TokenIds>>()) {
  constexpr float overflow = 3e38F;  // factors of this value are finite, and the logits of their rows are not
  constexpr Seconds expired{1e-9};   // a deadline that is over at once
  const auto given = [&](const char* name) { return record.contains(name) && !record.at(name).is_null(); };
  if (given("mode")) adapt.mode = parse_mode(record.at("mode").get<std::string>());
  if (given("tenant")) adapt.tenants.emplace(prompts.size(), record.at("tenant").get<std::string>());
  if (given("tenants")) adapt.tenants = record.at("tenants").get<std::vector<std::string>>();
  if (given("rank")) {
    factors_ = std::make_shared<CallerFactors>(record.at("rank"), model);
    if (record.value("overflows", false)) std::ranges::fill(factors_->values, overflow);
    adapt.factors = factors_->factors();
  }
  if (given("adapters")) {
    adapt.adapters.emplace();
    for (const Json& choice : record.at("adapters")) {
      Blend& blend = adapt.adapters->emplace_back();
      if (choice.is_string()) blend = choice.get<std::string>();
      if (choice.is_object()) blend = choice.get<std::map<std::string, float>>();
    }
  }
  if (given("conditioning")) {
    vectors_ = std::make_shared<CallerVectors>(record.at("conditioning"));
    adapt.conditioning = vectors_->matrix();
  }
  if (given("adapt_text")) {
    const Json& descriptions = record.at("adapt_text");
    if (descriptions.is_array()) {
      adapt.adapt_text = descriptions.get<std::vector<std::string>>();
    } else {
      adapt.adapt_text = descriptions.get<std::string>();
    }
  }
  if (given("adapt_tokens")) adapt.adapt_tokens = record.at("adapt_tokens").get<std::size_t>();
  if (given("max_new_tokens")) {
    const Json& limit = record.at("max_new_tokens");
    if (limit.is_array()) {
      generate.max_new_tokens = limit.get<std::vector<std::int64_t>>();
    } else {
      generate.max_new_tokens = limit.get<std::int64_t>();
    }
  }
  if (given("sampling")) {
    const Json& sampling = record.at("sampling");
    if (sampling.is_array()) {
      std::vector<Sampling> each;
      for (const Json& settings : sampling) each.push_back(read_sampling(settings));
      generate.sampling = each;
    } else {
      generate.sampling = read_sampling(sampling);
    }
  }
  generate.n = record.value("n", generate.n);
  if (record.value("expires", false)) generate.deadline = expired;
  if (given("deadline")) generate.deadline = Seconds(record.at("deadline").get<double>());
  generate.prompt_lookup_num_tokens = record.value("prompt_lookup_num_tokens", std::int64_t{0});
  generate.cache_salt = record.value("cache_salt", "");
  generate.cache_generated = record.value("cache_generated", true);
}

CallerFactors::CallerFactors(std::int64_t given, const ModelSpec& model)
    : rank(static_cast<std::size_t>(given)), hidden_size(static_cast<std::size_t>(model.hidden_size)) {
  for (std::int64_t i = 0; i < given * (model.hidden_size + model.vocab_size); ++i) {
    values.push_back(static_cast<float>((7 * i + 3) % 11 - 5) / 16);
  }
}

CallerVectors::CallerVectors(const Json& given) : rows(given.size()) {
  for (const Json& row : given) {
    for (const Json& value : row) values.push_back(value.get<float>());
  }
}

Factors CallerFactors::factors() const {
  const auto all = std::span(values);
  return head_factors(rank, all.first(rank * hidden_size), all.subspan(rank * hidden_size));
}

Factors head_factors(std::size_t rank, std::span<const float> lora_A, std::span<const float> lora_B) {
  const auto matrix = [rank](std::span<const float> values) {
    return Matrix{rank, rank > 0 ? values.size() / rank : 0, values};
  };
  return {{"lm_head.lora_A", matrix(lora_A)}, {"lm_head.lora_B", matrix(lora_B)}};
}

std::span<const float> lora_B_of(const Adaptation& adaptation) {
  return adaptation.factors.sets.tensors.at("lm_head.lora_B");
}

Sampling read_sampling(const Json& json) {
  Sampling sampling;
  sampling.temperature = json.value("temperature", sampling.temperature);
  sampling.top_k = json.value("top_k", sampling.top_k);
  sampling.top_p = json.value("top_p", sampling.top_p);
  sampling.repetition_penalty = json.value("repetition_penalty", sampling.repetition_penalty);
  sampling.presence_penalty = json.value("presence_penalty", sampling.presence_penalty);
  sampling.frequency_penalty = json.value("frequency_penalty", sampling.frequency_penalty);
  sampling.logit_bias = json.value("logit_bias", sampling.logit_bias);
  sampling.ignore_eos = json.value("ignore_eos", sampling.ignore_eos);
  if (json.contains("logprobs") && !json.at("logprobs").is_null()) sampling.logprobs = json.at("logprobs").get<int>();
  sampling.seed = json.value("seed", sampling.seed);
  sampling.stop_token_ids = json.value("stop_token_ids", std::vector<std::int64_t>());
  sampling.stop = json.value("stop", std::vector<std::string>());
  if (json.contains("masks")) sampling.allowed_tokens = recorded_masks(json.at("masks"));
  return sampling;
}

std::vector<float> read_logits(const Json& json) {
  if (json.contains("logits")) return json.at("logits").get<std::vector<float>>();
  std::vector<float> logits;
  for (std::int64_t i = 0; i < json.at("vocab_size"); ++i) logits.push_back(static_cast<float>(7919 * i % 10007) / 512);
  return logits;
}

}  // namespace chameleon::test
