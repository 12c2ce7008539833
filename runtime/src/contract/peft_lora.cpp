#include "contract/peft_lora.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <variant>

#include "chameleon/error.h"
#include "contract/mapped_file.h"
#include "contract/safetensors.h"
#include "factors.h"

namespace chameleon {

namespace fs = std::filesystem;

namespace {

using OrderedJson = nlohmann::ordered_json;  // of two patterns that match, the first of the file counts
using Names = std::vector<std::string>;

constexpr std::string_view kConfigFile = "adapter_config.json", kTensorFile = "adapter_model.safetensors";
constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::size_t kMaxConfigBytes = 1U << 20U;
constexpr std::size_t kShown = 80;  // characters of a pattern in a message
// What PCRE2 needs in a second or less. A pattern of a model's layers takes some thousand steps at most.
constexpr std::uint32_t kMatchSteps = 1'000'000, kMatchKilobytes = 1U << 16U;

// Options that do not change what a saved adapter computes.
constexpr std::array<std::string_view, 12> kWithoutEffect = {
    "auto_mapping",   "revision",   "peft_version",  "task_type",      "inference_mode",    "lora_dropout",
    "fan_in_fan_out", "eva_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"};
// Initialisations after which the base model is unchanged; PiSSA, OLoRA and others subtract the first factors from it.
constexpr std::array<std::string_view, 3> kInitialisations = {"gaussian", "eva", "orthogonal"};
constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kReasons = {{
    {"use_dora",
     "DoRA rescales the base model's matrices, which the rows of a batch share: merge it with PEFT (merge_and_unload, "
     "save_pretrained), and export that directory"},
    {"lora_bias",
     "an update has no bias: merge it with PEFT (merge_and_unload, save_pretrained), and export that directory"},
    {"init_lora_weights",
     "it changed the base model before training: save the adapter as a plain one, PEFT's "
     "save_pretrained(path_initial_model_for_weight_conversion=...)"},
    {"target_parameters", "name the layers as target_modules"},
}};

std::string own_bundle(const std::string& directory) {
  return "it replaces weights of the base model, which the rows of a batch share: export it as a bundle of its own, "
         "python -m chameleon_deploy.export " +
         directory + " --out BUNDLE";
}

/// The first characters of a UTF-8 text.
std::string_view first(std::string_view text, std::size_t characters) {
  std::size_t end = 0;
  for (; end < text.size(); ++end) {
    const bool begins = (static_cast<unsigned char>(text[end]) & 0xC0U) != 0x80U;
    if (begins && characters-- == 0) break;
  }
  return text.substr(0, end);
}

/// A text in quotes as Python writes it.
std::string repr(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string shown(1, quote);
  for (const char character : text) {
    const auto code = static_cast<unsigned char>(character);
    if (character == quote || character == '\\') {
      shown += {'\\', character};
    } else if (character == '\n' || character == '\r' || character == '\t') {
      shown += {'\\', character == '\n' ? 'n' : character == '\r' ? 'r' : 't'};
    } else if (code < 0x20 || code == 0x7F) {
      shown += {'\\', 'x', "0123456789abcdef"[code >> 4U], "0123456789abcdef"[code & 15U]};
    } else {
      shown += character;
    }
  }
  return shown + quote;
}

std::string joined(const Names& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// What a field of the configuration is not. The words are those of msgspec, which reads it in Python.

[[noreturn]] void expected(const char* type, const OrderedJson& json, const std::string& at) {
  const char* found = json.is_null()             ? "null"
                      : json.is_boolean()        ? "bool"
                      : json.is_number_integer() ? "int"
                      : json.is_number()         ? "float"
                      : json.is_string()         ? "str"
                      : json.is_array()          ? "array"
                                                 : "object";
  const std::string place = at.empty() ? "" : " - at `$" + at + "`";
  throw CheckpointError(std::string("Expected `") + type + "`, got `" + found + "`" + place);
}

void read(const OrderedJson& json, const std::string& at, bool& value, const char* type = "bool") {
  if (!json.is_boolean()) expected(type, json, at);
  value = json.get<bool>();
}

void read(const OrderedJson& json, const std::string& at, std::string& value, const char* type = "str") {
  if (!json.is_string()) expected(type, json, at);
  value = json.get<std::string>();
}

void read(const OrderedJson& json, const std::string& at, double& value, const char* type = "float") {
  if (!json.is_number()) expected(type, json, at);
  value = json.get<double>();
}

void read(const OrderedJson& json, const std::string& at, std::int64_t& value, const char* type = "int") {
  if (!json.is_number_integer()) expected(type, json, at);
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
    throw CheckpointError("Integer value out of range - at `$" + at + "`");
  }
  value = json.get<std::int64_t>();
}

template <class T>
void read(const OrderedJson& json, const std::string& at, std::vector<T>& values, const char* type = "array") {
  if (!json.is_array()) expected(type, json, at);
  values.clear();
  for (const OrderedJson& item : json) {
    const std::string place = at + "[" + std::to_string(values.size()) + "]";
    read(item, place, values.emplace_back());
  }
}

/// Values by pattern, in the order of the file.
template <class T>
using Patterns = std::vector<std::pair<std::string, T>>;

template <class T>
void read(const OrderedJson& json, const std::string& at, Patterns<T>& values, const char* type = "object") {
  if (!json.is_object()) expected(type, json, at);
  values.clear();
  for (const auto& [key, item] : json.items()) read(item, at + "[...]", values.emplace_back(key, T()).second);
}

/// Names in a list, or a regular expression.
using Modules = std::variant<Names, std::string>;

void read(const OrderedJson& json, const std::string& at, Modules& value, const char* type = "str | array") {
  if (json.is_string()) return read(json, at, value.emplace<std::string>());
  read(json, at, value.emplace<Names>(), type);
}

/// What may also be null.
template <class T>
void read_optional(const OrderedJson& json, const std::string& at, T& value, const char* type) {
  json.is_null() ? static_cast<void>(value = T()) : read(json, at, value, type);
}

/// The options that say which layers are adapted, and how.
struct PeftConfig {
  std::int64_t r = 0;
  double lora_alpha = 0;
  Modules target_modules;
  std::string peft_type = "LORA";
  bool use_rslora = false;
  Patterns<std::int64_t> rank_pattern;
  Patterns<double> alpha_pattern;
  Modules exclude_modules;
  std::vector<std::int64_t> layers_to_transform;
  Names layers_pattern;
  std::string bias = "none";
  std::optional<std::string> init_lora_weights;  // where it is a name
  bool saves_modules = false;
  bool trains_tokens = false;
  std::vector<std::int64_t> alora_invocation_tokens;
};

/// How each option is read, by its name.
using Readers = std::map<std::string, std::function<void(const OrderedJson&, const std::string&)>, std::less<>>;

Readers readers(PeftConfig& config) {
  const auto required = [](auto& value) {
    return [&value](const OrderedJson& json, const std::string& at) { read(json, at, value); };
  };
  const auto optional = [](auto& value, const char* type) {
    return [&value, type](const OrderedJson& json, const std::string& at) { read_optional(json, at, value, type); };
  };
  return {
      {"r", required(config.r)},
      {"lora_alpha", required(config.lora_alpha)},
      {"target_modules", required(config.target_modules)},
      {"peft_type", required(config.peft_type)},
      {"use_rslora", required(config.use_rslora)},
      {"rank_pattern", optional(config.rank_pattern, "object | null")},
      {"alpha_pattern", optional(config.alpha_pattern, "object | null")},
      {"exclude_modules", optional(config.exclude_modules, "str | array | null")},
      {"bias", required(config.bias)},
      {"alora_invocation_tokens", optional(config.alora_invocation_tokens, "array | null")},
      {"base_model_name_or_path",
       [](const OrderedJson& json, const std::string& at) {
         std::string ignored;
         read_optional(json, at, ignored, "str | null");
       }},
      {"layers_to_transform",
       [&config](const OrderedJson& json, const std::string& at) {
         if (json.is_number_integer()) return read(json, at, config.layers_to_transform.emplace_back());
         read_optional(json, at, config.layers_to_transform, "int | array | null");
       }},
      {"layers_pattern",
       [&config](const OrderedJson& json, const std::string& at) {
         if (json.is_string()) return read(json, at, config.layers_pattern.emplace_back());
         read_optional(json, at, config.layers_pattern, "str | array | null");
       }},
      {"init_lora_weights",
       [&config](const OrderedJson& json, const std::string& at) {
         if (json.is_boolean() || json.is_null()) return;
         read(json, at, config.init_lora_weights.emplace(), "bool | str | null");
       }},
      {"modules_to_save",
       [&config](const OrderedJson& json, const std::string& at) {
         Names modules;
         read_optional(json, at, modules, "array | null");
         config.saves_modules = !modules.empty();
       }},
      {"trainable_token_indices",
       [&config](const OrderedJson& json, const std::string& at) {
         Patterns<std::vector<std::int64_t>> by_layer;
         std::vector<std::int64_t> tokens;
         if (json.is_object()) {
           read(json, at, by_layer);
         } else {
           read_optional(json, at, tokens, "object | array | null");
         }
         config.trains_tokens = !by_layer.empty() || !tokens.empty();
       }},
  };
}

/// Whether Python takes a value for true.
bool is_set(const OrderedJson& json) {
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number()) return json.get<double>() != 0;
  return !json.is_null() && (json.is_string() ? !json.get_ref<const std::string&>().empty() : !json.empty());
}

/// Read the options, and name those in `refused` that have an effect and are unknown.
PeftConfig read_options(std::string_view content, Names& refused) {
  const OrderedJson json = OrderedJson::parse(content);
  if (!json.is_object()) expected("object", json, "");
  PeftConfig config;
  const Readers known = readers(config);
  for (const auto& [name, value] : json.items()) {
    if (const auto reader = known.find(name); reader != known.end()) {
      reader->second(value, "." + name);
    } else if (is_set(value) && std::ranges::find(kWithoutEffect, name) == kWithoutEffect.end()) {
      refused.push_back(name);
    }
  }
  for (const char* name : {"r", "lora_alpha", "target_modules"}) {
    if (!json.contains(name)) throw CheckpointError(std::string("Object missing required field `") + name + "`");
  }
  return config;
}

/// Throws CheckpointError for options that are not those of a plain LoRA.
void check_refused(const PeftConfig& config, Names refused, const std::string& file, const std::string& directory) {
  if (config.peft_type != "LORA") refused.push_back("peft_type=" + config.peft_type);
  if (const auto& name = config.init_lora_weights;
      name && std::ranges::find(kInitialisations, *name) == kInitialisations.end()) {
    refused.push_back("init_lora_weights=" + *name);
  }
  for (const std::string& option : refused) {
    const std::string_view name = std::string_view(option).substr(0, option.find('='));
    for (const auto& [known, reason] : kReasons) {
      if (name == known) throw CheckpointError(file + ": " + joined(refused) + ": " + std::string(reason));
    }
  }
  if (!refused.empty()) {
    throw CheckpointError(file + ": " + joined(refused) + ": only a plain low-rank update can be deployed");
  }
  Names replaced;
  if (config.saves_modules) replaced.emplace_back("modules_to_save");
  if (config.trains_tokens) replaced.emplace_back("trainable_token_indices");
  if (config.bias != "none") replaced.push_back("bias=" + config.bias);
  if (!replaced.empty()) throw CheckpointError(file + ": " + joined(replaced) + ": " + own_bundle(directory));
}

/// Throws CheckpointError for numbers that no LoRA has.
void check_numbers(const PeftConfig& config, const std::string& file) {
  std::int64_t least = config.r, most = config.r;
  for (const auto& [pattern, rank] : config.rank_pattern) {
    least = std::min(least, rank);
    most = std::max(most, rank);
  }
  if (least < 1 || most > kMaxRank) {
    throw CheckpointError(file + ": ranks " + std::to_string(least) + " to " + std::to_string(most) +
                          ": they must be from 1 to " + std::to_string(kMaxRank));
  }
  const std::vector<std::int64_t>& tokens = config.alora_invocation_tokens;
  if (tokens.size() > kMaxInvocationTokens) {
    throw CheckpointError(file + ": alora_invocation_tokens must be a list of 1 to " +
                          std::to_string(kMaxInvocationTokens) + " token ids");
  }
  for (const std::int64_t token : tokens) {
    if (token < 0 || token > std::numeric_limits<std::int32_t>::max()) {
      throw CheckpointError(file + ": alora_invocation_tokens hold " + std::to_string(token) +
                            ", which is no token id");
    }
  }
}

PeftConfig read_config(std::string_view content, const std::string& file, const std::string& directory) {
  Names refused;
  PeftConfig config;
  try {
    config = read_options(content, refused);
  } catch (const OrderedJson::exception&) {  // whose words hold bytes of the file
    throw CheckpointError(file + ": not a PEFT LoRA configuration: malformed JSON, or a number beyond float64");
  } catch (const CheckpointError& error) {
    throw CheckpointError(file + ": not a PEFT LoRA configuration: " + error.what());
  }
  check_refused(config, std::move(refused), file, directory);
  check_numbers(config, file);
  return config;
}

/// How a layer is adapted.
struct Update {
  std::int64_t rank;
  double scaling;
};

/// Which layers a configuration adapts, and how. The patterns are compiled once.
class Layers {
 public:
  Layers(const PeftConfig& config, std::string file) : config_(config), file_(std::move(file)) {}

  /// The update of a linear layer of that name; nothing for one that PEFT does not adapt.
  std::optional<Update> update(const std::string& layer) {
    if (!adapts(layer)) return std::nullopt;
    const std::int64_t rank = of_pattern(config_.rank_pattern, layer, config_.r);
    const double alpha = of_pattern(config_.alpha_pattern, layer, config_.lora_alpha);
    const auto size = static_cast<double>(rank);
    return Update{rank, alpha / (config_.use_rslora ? std::sqrt(size) : size)};
  }

 private:
  bool adapts(const std::string& layer) {
    if (is_given(config_.exclude_modules) && matches(config_.exclude_modules, layer)) return false;
    const auto* pattern = std::get_if<std::string>(&config_.target_modules);
    if (pattern != nullptr && *pattern == "all-linear") return layer != kHead;
    return matches(config_.target_modules, layer) && (pattern != nullptr || is_transformed(layer));
  }

  static bool is_given(const Modules& modules) {
    return std::visit([](const auto& value) { return !value.empty(); }, modules);
  }

  bool matches(const Modules& modules, const std::string& layer) {
    if (const auto* pattern = std::get_if<std::string>(&modules)) return match(*pattern, layer).has_value();
    return std::ranges::any_of(std::get<Names>(modules),
                               [&](const std::string& name) { return layer == name || layer.ends_with("." + name); });
  }

  /// The value of the first pattern that is the end of a layer's name, as in PEFT.
  template <class T>
  T of_pattern(const Patterns<T>& patterns, const std::string& layer, T otherwise) {
    for (const auto& [pattern, value] : patterns) {
      if (match("(.*\\.)?(" + pattern + ")", layer)) return value;
    }
    return otherwise;
  }

  /// Whether `layers_to_transform` has the number in a layer's name, or there is no such option.
  bool is_transformed(const std::string& layer) {
    if (config_.layers_to_transform.empty()) return true;
    const Names& patterns = config_.layers_pattern;
    for (const std::string& pattern : patterns.empty() ? Names{"[^.]*"} : patterns) {
      const auto found = match("(?:^|.*?\\.)" + pattern + "\\.(\\d+)\\..*", layer);
      if (!found) continue;
      if (found->groups > 1) {  // PEFT takes the first for the number
        throw CheckpointError(std::string(kConfigFile) + ": layers_pattern " +
                              std::string(first(repr(pattern), kShown)) + " has a group: write (?:...)");
      }
      std::int64_t number = 0;
      const std::string_view digits = found->first;
      if (std::from_chars(digits.data(), digits.data() + digits.size(), number).ec != std::errc()) return false;
      return std::ranges::find(config_.layers_to_transform, number) != config_.layers_to_transform.end();
    }
    return false;
  }

  struct Match {
    std::uint32_t groups;
    std::string_view first;  // what the first group matched
  };

  /// Match a whole name.
  std::optional<Match> match(const std::string& pattern, std::string_view layer) {
    const pcre2_code* code = compiled(pattern);
    const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> limits(
        pcre2_match_context_create(nullptr), pcre2_match_context_free);
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> found(
        pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
    if (!limits || !found) throw std::bad_alloc();
    pcre2_set_match_limit(limits.get(), kMatchSteps);
    pcre2_set_heap_limit(limits.get(), kMatchKilobytes);
    const int count =
        pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(layer.data()), layer.size(), 0, 0, found.get(), limits.get());
    if (count == PCRE2_ERROR_NOMATCH) return std::nullopt;
    if (count < 0) throw CheckpointError(file_ + ": a pattern takes over 1 s to match");
    Match result{0, {}};
    pcre2_pattern_info(code, PCRE2_INFO_CAPTURECOUNT, &result.groups);
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(found.get());
    if (count > 1 && offsets[2] != PCRE2_UNSET) result.first = layer.substr(offsets[2], offsets[3] - offsets[2]);
    return result;
  }

  const pcre2_code* compiled(const std::string& pattern) {
    std::shared_ptr<pcre2_code>& code = compiled_[pattern];
    if (code) return code.get();
    int problem = 0;
    PCRE2_SIZE offset = 0;
    code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_NEVER_BACKSLASH_C,
                             &problem, &offset, nullptr),
               pcre2_code_free);
    if (code) return code.get();
    std::array<PCRE2_UCHAR, 128> words{};
    pcre2_get_error_message(problem, words.data(), words.size());
    throw CheckpointError(std::string(kConfigFile) + ": " + std::string(first(repr(pattern), kShown)) + ": " +
                          reinterpret_cast<const char*>(words.data()) + " at position " + std::to_string(offset));
  }

  const PeftConfig& config_;
  const std::string file_;
  std::map<std::string, std::shared_ptr<pcre2_code>> compiled_;
};

/// The values of a tensor, exactly.
std::vector<double> values_of(const SafeTensor& tensor) {
  const auto items = [&]<class T>(T, const auto& value) {
    std::vector<double> values(tensor.bytes.size() / sizeof(T));
    for (std::size_t i = 0; i < values.size(); ++i) {
      T item{};
      std::memcpy(&item, tensor.bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = value(item);
    }
    return values;
  };
  if (tensor.dtype == "F64") return items(double(), [](double item) { return item; });
  if (tensor.dtype == "F32") return items(float(), [](float item) { return static_cast<double>(item); });
  if (tensor.dtype == "BF16") {  // the upper half of a float32
    return items(std::uint16_t(), [](std::uint32_t item) { return double{std::bit_cast<float>(item << 16U)}; });
  }
  return items(std::uint16_t(), [](std::uint32_t item) {  // F16: sign, 5 bits of exponent, 10 of fraction
    const auto exponent = static_cast<int>(item >> 10U & 31U);
    const auto fraction = static_cast<double>(item & 1023U);
    const double size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return item >> 15U != 0 ? -size : size;
  });
}

/// Whether a stored head is the base model's, of which a bundle has the token embedding.
bool is_head(const SafeTensor& tensor, const Bundle& bundle) {
  const StoredTensor& head = bundle.manifest.token_embedding;
  if (tensor.shape != head.shape) return false;
  const std::string_view bytes(reinterpret_cast<const char*>(bundle.embedding.data()), bundle.embedding.size());
  const std::vector<double> values = values_of(tensor);
  if (head.dtype == "int8") {
    return std::ranges::equal(values, bytes.substr(0, values.size()), {}, {},
                              [](char item) { return static_cast<double>(static_cast<signed char>(item)); });
  }
  const bool is_half = head.dtype == "float16";
  return values == values_of({is_half ? "F16" : "F32", head.shape, bytes.substr(0, values.size() * (is_half ? 2 : 4))});
}

/// A [rank, in] and B [out, rank] of a layer, as they are stored.
struct Pair {
  const SafeTensor* lora_A = nullptr;
  const SafeTensor* lora_B = nullptr;
};

/// The layer and the part, 'A' or 'B', of a tensor's name; no part for any other name.
std::pair<std::string, char> parse_name(std::string_view name) {
  constexpr std::string_view A = ".lora_A.weight", B = ".lora_B.weight";
  const bool is_part = name.ends_with(A) || name.ends_with(B);
  if (!is_part || !name.starts_with(kPrefix) || name.size() <= kPrefix.size() + A.size()) return {"", '\0'};
  const std::string_view layer = name.substr(kPrefix.size(), name.size() - kPrefix.size() - A.size());
  if (layer.find('\n') != std::string_view::npos) return {"", '\0'};
  return {std::string(layer), name.ends_with(A) ? 'A' : 'B'};
}

/// The tensors of every layer. Throws TensorError for any other tensor.
std::map<std::string, Pair> pairs(const SafeTensors& file, const std::string& directory, const Bundle& bundle) {
  for (const auto& [name, tensor] : file.tensors) {
    if (tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16" && tensor.dtype != "F64") {
      throw TensorError(directory + ": " + name + " is " + tensor.dtype + ": save it as F32, F16, BF16, F64");
    }
  }
  const std::string head = std::string(kPrefix) + std::string(kHead) + ".base_layer.weight";
  if (const auto stored = file.tensors.find(head); stored != file.tensors.end() && !is_head(stored->second, bundle)) {
    throw TensorError(directory + ": its " + std::string(kHead) +
                      " differs from the base model's: " + own_bundle(directory));
  }
  std::map<std::string, Pair> found;
  for (const auto& [name, tensor] : file.tensors) {
    if (name == head) continue;
    const auto [layer, part] = parse_name(name);
    if (part == '\0') {
      const bool is_whole =
          name.find("lora_") == std::string::npos || name.find("lora_embedding_") != std::string::npos;
      throw TensorError(directory + ": tensor " + repr(name) + ": " +
                        (is_whole ? own_bundle(directory) : "only lora_A and lora_B of linear layers can be deployed"));
    }
    (part == 'A' ? found[layer].lora_A : found[layer].lora_B) = &tensor;
  }
  const auto is_matrix = [](const SafeTensor* tensor) { return tensor != nullptr && tensor->shape.size() == 2; };
  for (const auto& [layer, pair] : found) {
    if (!is_matrix(pair.lora_A) || !is_matrix(pair.lora_B)) {
      throw TensorError(directory + ": " + layer + " needs lora_A and lora_B, both matrices");
    }
  }
  return found;
}

/// Throws TensorError unless the tensors are those of the layers that the configuration names.
void check_layers(const std::map<std::string, Pair>& found, const std::map<std::string, Update>& wanted,
                  const AdaptationSpec& spec, const std::string& directory) {
  for (const auto& [layer, pair] : found) {
    if (std::ranges::find(spec.targets, layer, &TargetSpec::name) == spec.targets.end()) {
      throw TensorError(directory + ": adapts " + repr(layer) +
                        ", which is not among the linear layers that can be adapted");
    }
  }
  Names differing;
  for (const auto& [layer, pair] : found) {
    if (!wanted.contains(layer)) differing.push_back(layer);
  }
  for (const auto& [layer, update] : wanted) {
    if (!found.contains(layer)) differing.push_back(layer);
  }
  if (!wanted.empty() && differing.empty()) return;
  std::ranges::sort(differing);
  for (std::string& layer : differing) layer = repr(layer);
  throw TensorError(directory + ": its tensors and target_modules differ at " +
                    (differing.empty() ? "every layer" : "[" + joined(differing) + "]"));
}

/// A matrix [rank, width], scaled and padded to [padded, width]. Throws TensorError.
///
/// is_transposed: it is stored as [width, rank]
std::vector<float> factor(const SafeTensor& tensor, bool is_transposed, std::int64_t rank, std::int64_t width,
                          std::int64_t padded, double scaling, const std::string& what) {
  const std::int64_t rows = tensor.shape[is_transposed ? 1 : 0], columns = tensor.shape[is_transposed ? 0 : 1];
  if (rows != rank || columns != width) {
    const auto text = [](std::int64_t a, std::int64_t b) {
      return shape_text(static_cast<std::size_t>(a), static_cast<std::size_t>(b));
    };
    throw TensorError(what + " has shape " + text(rows, columns) + ", not " + text(rank, width));
  }
  const std::vector<double> stored = values_of(tensor);
  const auto height = static_cast<std::size_t>(rank), size = static_cast<std::size_t>(width);
  std::vector<float> values(static_cast<std::size_t>(padded) * size);
  const auto scale = static_cast<float>(scaling);
  for (std::size_t row = 0; row < height; ++row) {
    for (std::size_t column = 0; column < size; ++column) {
      const double value = stored[is_transposed ? column * height + row : row * size + column];
      float& scaled = values[row * size + column] = static_cast<float>(value) * scale;
      if (std::isfinite(scaled)) continue;
      std::array<char, 32> number{};
      std::snprintf(number.data(), number.size(), "%g", scaling);
      throw TensorError(what + ", scaled by " + number.data() + ", holds NaN, infinity or beyond float32");
    }
  }
  return values;
}

/// The factors of all targets of a bundle.
FactorSets factors(const std::map<std::string, Pair>& found, const std::map<std::string, Update>& wanted,
                   const AdaptationSpec& spec, const std::string& directory) {
  std::int64_t largest = 1;
  for (const auto& [layer, update] : wanted) largest = std::max(largest, update.rank);
  check_rank(directory, largest, spec);  // before memory is taken: the padding may be larger than the files
  std::map<std::string, std::vector<float>> tensors;
  for (const auto& [name, in_features, out_features] : spec.targets) {  // in the order of the model
    const std::string A = name + ".lora_A", B = name + ".lora_B";
    if (const auto pair = found.find(name); pair != found.end()) {
      const auto [rank, scaling] = wanted.at(name);
      tensors[A] = factor(*pair->second.lora_A, false, rank, in_features, largest, 1, directory + ": " + A);
      tensors[B] = factor(*pair->second.lora_B, true, rank, out_features, largest, scaling, directory + ": " + B);
    } else {
      tensors[A].resize(static_cast<std::size_t>(largest * in_features));
      tensors[B].resize(static_cast<std::size_t>(largest * out_features));
    }
  }
  return make_factor_sets(1, largest, std::move(tensors));
}

SafeTensors parse_tensors(std::string_view content, const std::string& file) try {
  return parse_safetensors(content, file);
} catch (const TensorError& error) {  // no tensor is at fault here
  throw CheckpointError(error.what());
}

/// The size that the tensors of no adapter exceed: all layers with the largest rank and a head, float64.
std::size_t most_tensor_bytes(const Bundle& bundle) {
  std::int64_t values = 0;
  for (const auto& [name, width] : bundle.manifest.adaptation.factor_widths()) values += width * kMaxRank;
  const std::vector<std::int64_t>& head = bundle.manifest.token_embedding.shape;
  return kMaxHeaderBytes + 8 * static_cast<std::size_t>(values + head[0] * head[1]);
}

std::string changed(const fs::path& directory) {
  return directory.string() + " has changed while it was read: load it again";
}

/// Append a plain file, also one at the end of links, as caches of downloads have them. It is copied and not mapped:
/// the end of a mapped file may vanish. Throws CheckpointError, or AdapterError where it changes.
void append_file(std::string& content, const fs::path& file, std::size_t most) {
  std::error_code problem;
  if (!fs::is_regular_file(file, problem)) throw CheckpointError(file.string() + " is missing, or no plain file");
  const std::uintmax_t size = fs::file_size(file, problem);
  if (size > most) {
    throw CheckpointError(file.string() + ": over " + std::to_string(most) + " bytes are no LoRA of this model");
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw CheckpointError(file.string() + ": " + std::strerror(errno));
  const std::size_t begin = content.size();
  content.resize(begin + static_cast<std::size_t>(size));
  stream.read(content.data() + begin, static_cast<std::streamsize>(size));
  if (!stream || stream.peek() != std::ifstream::traits_type::eof()) throw AdapterError(changed(file.parent_path()));
}

}  // namespace

StoredAdapter parse_peft(const PeftFiles& files, const fs::path& directory, const Bundle& bundle) {
  const AdaptationSpec& spec = bundle.manifest.adaptation;
  const std::string where = directory.string(), file = (directory / kConfigFile).string();
  const PeftConfig config = read_config(files.config, file, where);
  Layers layers(config, file);
  std::map<std::string, Update> wanted;
  for (const TargetSpec& target : spec.targets) {
    if (const auto update = layers.update(target.name)) wanted.emplace(target.name, *update);
  }
  const SafeTensors parsed = parse_tensors(files.tensors, (directory / kTensorFile).string());
  const std::map<std::string, Pair> found = pairs(parsed, where, bundle);
  check_layers(found, wanted, spec, where);
  StoredAdapter adapter{factors(found, wanted, spec, where), config.alora_invocation_tokens, {}};
  const std::int64_t vocab_size = bundle.manifest.model.vocab_size;
  for (const std::int64_t token : adapter.invocation_tokens) {
    if (token >= vocab_size) {
      throw AdapterError(where + ": its invocation_tokens hold " + std::to_string(token) + ": this bundle has " +
                         std::to_string(vocab_size) + " tokens");
    }
  }
  return adapter;
}

StoredAdapter read_peft(const fs::path& path, const Bundle& bundle) {
  const fs::path directory = path.has_filename() ? path : path.parent_path();  // without a slash at its end
  if (bundle.manifest.adaptation.base_digest.empty()) {
    throw AdapterError(directory.string() +
                       ": this bundle takes no adapters: export its base model, with --adaptable LAYERS");
  }
  std::string content, again;
  append_file(content, directory / kConfigFile, kMaxConfigBytes);
  const std::size_t end = content.size();
  append_file(content, directory / kTensorFile, most_tensor_bytes(bundle));
  append_file(again, directory / kConfigFile, kMaxConfigBytes);
  const std::string_view all = content;
  if (again != all.substr(0, end)) throw AdapterError(changed(directory));
  StoredAdapter adapter = parse_peft({all.substr(0, end), all.substr(end)}, directory, bundle);
  adapter.digest = sha256(std::as_bytes(std::span(content)));
  return adapter;
}

}  // namespace chameleon
