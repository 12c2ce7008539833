#include "chameleon/manifest.h"

#include <array>
#include <bit>
#include <cctype>
#include <cmath>
#include <limits>
#include <set>

#include "chameleon/error.h"
#include "contract/json_fields.h"
#include "contract/precision.h"
#include "contract/signature.h"

namespace chameleon {

namespace {

constexpr std::array<std::string_view, 6> kModes = {"none", "static", "centroid", "request", "cohort", "tenant"};
constexpr const char* kFormat = "chameleon-bundle";
constexpr std::int64_t kFormatVersion = 1;

}  // namespace

Error::~Error() = default;

std::string_view to_string(Mode mode) { return kModes.at(static_cast<std::size_t>(mode)); }

Mode parse_mode(std::string_view name) {
  const auto found = std::ranges::find(kModes, name);
  if (found == kModes.end()) {
    throw ModeError("'" + std::string(name) +
                    "' is not a mode: choose one of none, static, centroid, request, cohort, tenant");
  }
  return static_cast<Mode>(found - kModes.begin());
}

// One `read` per struct, found by json_fields.h through argument-dependent lookup.

static void read(const Json& json, const std::string& at, TensorSpec& spec) {
  Fields(json, at)
      .required("name", spec.name)
      .one_of("dtype", spec.dtype, {"float32", "float16", "bfloat16", "int8", "int32", "int64"})
      .required("shape", spec.shape)
      .finish();
}

static void read(const Json& json, const std::string& at, GraphSpec& spec) {
  Fields(json, at)
      .required("file", spec.file)
      .one_of("role", spec.role, {"decoder", "hypernetwork", "encoder", "chooser", "logits_scorer", "hidden_scorer"})
      .required("cache", spec.cache)
      .required("providers", spec.providers)
      .required("inputs", spec.inputs)
      .required("outputs", spec.outputs)
      .finish();
}

static void read(const Json& json, const std::string& at, StoredTensor& tensor) {
  Fields(json, at)
      .required("file", tensor.file)
      .one_of("dtype", tensor.dtype, {"float32", "float16", "int8"})
      .required("shape", tensor.shape)
      .required("offset", tensor.offset)
      .optional("row_scales_offset", tensor.row_scales_offset)
      .optional("channel_scales_offset", tensor.channel_scales_offset)
      .optional("rotation", tensor.rotation)
      .finish();
}

void read(const Json& json, const std::string& at, FileSpec& spec) {
  Fields(json, at).required("size", spec.size).required("sha256", spec.sha256).finish();
}

static void read(const Json& json, const std::string& at, ModelSpec& model) {
  Fields(json, at)
      .required("architecture", model.architecture)
      .required("vocab_size", model.vocab_size)
      .required("hidden_size", model.hidden_size)
      .required("num_layers", model.num_layers)
      .required("num_attention_heads", model.num_attention_heads)
      .required("num_key_value_heads", model.num_key_value_heads)
      .required("head_dim", model.head_dim)
      .required("max_positions", model.max_positions)
      .required("eos_token_id", model.eos_token_id)
      .finish();
}

static void read(const Json& json, const std::string& at, TargetSpec& target) {
  Fields(json, at)
      .required("name", target.name)
      .required("in_features", target.in_features)
      .required("out_features", target.out_features)
      .finish();
}

static void read(const Json& json, const std::string& at, AdaptationSpec& spec) {
  Fields(json, at)
      .one_of("regime", spec.regime, {"base", "chameleon", "lora"})
      .required("rank", spec.rank)
      .required("alpha", spec.alpha)
      .required("targets", spec.targets)
      .required("num_clusters", spec.num_clusters)
      .one_of("protocol", spec.protocol, {"masked", "paper"})
      .required("max_length", spec.max_length)
      .optional("adapters", spec.adapters)
      .optional("base_digest", spec.base_digest)
      .optional("conditioning_size", spec.conditioning_size)
      .optional("invocation_tokens", spec.invocation_tokens)
      .finish();
}

static void read(const Json& json, const std::string& at, EncoderSpec& spec) {
  Fields(json, at)
      .required("size", spec.size)
      .required("vocab_size", spec.vocab_size)
      .required("max_tokens", spec.max_tokens)
      .required("prefix_ids", spec.prefix_ids)
      .required("suffix_ids", spec.suffix_ids)
      .optional("conditioning_norm", spec.conditioning_norm)
      .optional("full_stop", spec.full_stop)
      .finish();
}

static void read(const Json& json, const std::string& at, LimitsSpec& limits) {
  Fields(json, at)
      .required("batch", limits.batch)
      .required("sequence", limits.sequence)
      .required("past", limits.past)
      .required("factor_sets", limits.factor_sets)
      .finish();
}

static void read(const Json& json, const std::string& at, Parameters& parameters) {
  Fields(json, at)
      .required("base", parameters.base)
      .required("factors", parameters.factors)
      .required("hypernetwork", parameters.hypernetwork)
      .finish();
}

static void read(const Json& json, const std::string& at, ParitySummary& parity) {
  Fields(json, at)
      .required("verified", parity.verified)
      .optional("checks", parity.checks)
      .optional("max_abs_logit_difference", parity.max_abs_logit_difference)
      .optional("accepted_kl", parity.accepted_kl)
      .finish();
}

static void read(const Json& json, const std::string& at, Manifest& manifest) {
  Fields(json, at)
      .required("format", manifest.format)
      .required("format_version", manifest.format_version)
      .one_of("precision", manifest.precision, {"fp32", "fp16", "bf16", "int8", "int4"})
      .required("model", manifest.model)
      .required("adaptation", manifest.adaptation)
      .required("limits", manifest.limits)
      .required("parameters", manifest.parameters)
      .required("graphs", manifest.graphs)
      .required("token_embedding", manifest.token_embedding)
      .required("files", manifest.files)
      .required("parity", manifest.parity)
      .required("checkpoint_digest", manifest.checkpoint_digest)
      .required("tools", manifest.tools)
      .optional("encoder", manifest.encoder)
      .finish();
  for (const auto& [name, graph] : manifest.graphs) {
    if (graph.cache && *graph.cache != "growing" && *graph.cache != "shared") {
      fail_at(at + ".graphs." + name, "unknown cache " + *graph.cache);
    }
  }
}

std::map<std::string, std::int64_t> AdaptationSpec::factor_widths() const {
  std::map<std::string, std::int64_t> widths;
  for (const TargetSpec& target : targets) {
    widths[target.name + ".lora_A"] = target.in_features;
    widths[target.name + ".lora_B"] = target.out_features;
  }
  return widths;
}

bool Manifest::has_basis() const {
  return is_integer(precision) &&
         std::ranges::any_of(adaptation.targets, [](const TargetSpec& target) { return target.name != kHead; });
}

std::int64_t Manifest::hypernetwork_width() const {
  return adaptation.conditioning_size != 0 ? adaptation.conditioning_size : model.hidden_size;
}

std::vector<Mode> available_modes(const AdaptationSpec& spec) {
  if (spec.regime == "base" && spec.targets.empty()) return {Mode::none};
  if (spec.regime != "chameleon") return {Mode::none, Mode::static_};
  if (spec.num_clusters == 0) return {Mode::none, Mode::static_, Mode::request};
  return {Mode::none, Mode::static_, Mode::centroid, Mode::request, Mode::cohort, Mode::tenant};
}

static bool is_plain_name(std::string_view name) {
  const auto allowed = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  };
  // 255 bytes is the longest file name of common file systems.
  return !name.empty() && name.size() <= 255 && name.front() != '.' && std::ranges::all_of(name, allowed);
}

/// Whether `rows` rows of `width` bytes at an offset lie inside a file of `size` bytes; no product can overflow.
static bool fits(std::int64_t offset, std::int64_t rows, std::int64_t width, std::int64_t size) {
  return offset >= 0 && offset <= size && rows <= (size - offset) / width;
}

// Graphs count tokens in int32.
static constexpr std::int64_t kMaxDimension = std::numeric_limits<std::int32_t>::max();

static void check_model(const ModelSpec& model, const std::string& where) {
  const std::initializer_list<std::pair<const char*, std::int64_t>> dimensions = {
      {"vocab_size", model.vocab_size},
      {"hidden_size", model.hidden_size},
      {"num_layers", model.num_layers},
      {"num_attention_heads", model.num_attention_heads},
      {"num_key_value_heads", model.num_key_value_heads},
      {"head_dim", model.head_dim},
      {"max_positions", model.max_positions}};
  for (const auto& [name, value] : dimensions) {
    if (value < 1 || value > kMaxDimension) {
      fail_at(where, std::string("model.") + name + " must be between 1 and " + std::to_string(kMaxDimension));
    }
  }
  if (model.num_attention_heads % model.num_key_value_heads != 0) {
    fail_at(where, "model.num_attention_heads is not a multiple of model.num_key_value_heads");
  }
  if (model.eos_token_id < 0 || model.eos_token_id >= model.vocab_size) {
    fail_at(where, "model.eos_token_id " + std::to_string(model.eos_token_id) + " is outside the vocabulary");
  }
}

static void check_adaptation(const AdaptationSpec& adaptation, const ModelSpec& model, const std::string& where) {
  const std::int64_t least_rank = adaptation.targets.empty() ? 0 : 1;
  if (adaptation.rank < least_rank || adaptation.num_clusters < 0 || adaptation.max_length < 1) {
    fail_at(where, "adaptation has a rank, num_clusters or max_length out of range");
  }
  std::set<std::string> names;
  for (const TargetSpec& target : adaptation.targets) {
    if (target.name.empty() || target.in_features < 1 || target.out_features < 1) {
      fail_at(where, "adaptation.targets: '" + target.name + "' has no name or a dimension below 1");
    }
    names.insert(target.name);
    if (target.name == kHead && (target.in_features != model.hidden_size || target.out_features != model.vocab_size)) {
      fail_at(where, "adaptation.targets: lm_head is not [hidden_size, vocab_size]");
    }
  }
  if ((names.empty() && adaptation.regime != "base") || names.size() != adaptation.targets.size()) {
    fail_at(where, "adaptation.targets must name at least one layer, and each layer once");
  }
}

bool is_adapter_name(std::string_view name) {
  const auto is_plain = [](unsigned char c) { return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-'; };
  return !name.empty() && name.size() <= 64 && std::isalnum(static_cast<unsigned char>(name.front())) != 0 &&
         std::ranges::all_of(name, is_plain) && std::ranges::find(kModes, name) == kModes.end();
}

static void check_adapters(const AdaptationSpec& adaptation, const ModelSpec& model, const std::string& where) {
  const std::vector<std::string>& names = adaptation.adapters;
  if (std::set(names.begin(), names.end()).size() < names.size() || !std::ranges::all_of(names, is_adapter_name)) {
    fail_at(where, "adaptation.adapters must be distinct names of " + std::string(kAdapterName));
  }
  if (!names.empty() && adaptation.regime != "lora") {
    fail_at(where, "adaptation.adapters goes with a base_digest and regime 'lora'");
  }
  if (adaptation.base_digest.empty() == (!names.empty() || adaptation.regime == "base")) {
    fail_at(where, "adaptation.base_digest goes with adapters or regime 'base'");
  }
  const auto is_token = [&](std::int64_t token) { return token >= 0 && token < model.vocab_size; };
  for (const auto& [name, tokens] : adaptation.invocation_tokens) {
    if (std::ranges::find(names, name) == names.end()) {
      fail_at(where, "adaptation.invocation_tokens names '" + name.substr(0, 80) + "', which is no adapter");
    }
    if (tokens.empty() || tokens.size() > kMaxInvocationTokens || !std::ranges::all_of(tokens, is_token)) {
      fail_at(where, "adaptation.invocation_tokens of " + name + " must be 1 to " +
                         std::to_string(kMaxInvocationTokens) + " tokens of the vocabulary");
    }
  }
}

static void check_conditioning_size(const AdaptationSpec& adaptation, const std::string& where) {
  const std::int64_t size = adaptation.conditioning_size;
  const bool is_allowed = adaptation.regime == "chameleon" && adaptation.num_clusters == 0;
  if (size < 0 || size > kMaxDimension || (size != 0 && !is_allowed)) {
    fail_at(where, "adaptation.conditioning_size goes with regime 'chameleon' and no clusters");
  }
}

/// An encoder has a graph, and its embeddings are what the hypernetwork reads.
static void check_encoder(const Manifest& manifest, const std::string& where) {
  const auto is_encoder = [](const auto& graph) { return graph.second.role == "encoder"; };
  if (std::ranges::count_if(manifest.graphs, is_encoder) != (manifest.encoder ? 1 : 0)) {
    fail_at(where, "encoder goes with one graph of the role 'encoder'");
  }
  if (!manifest.encoder) return;
  const EncoderSpec& encoder = *manifest.encoder;
  std::vector<std::int64_t> special = encoder.prefix_ids;
  special.insert(special.end(), encoder.suffix_ids.begin(), encoder.suffix_ids.end());
  if (encoder.vocab_size < 1 || encoder.vocab_size > kMaxDimension || encoder.max_tokens <= std::ssize(special) ||
      encoder.max_tokens > kMaxDimension) {
    fail_at(where, "encoder has a vocab_size or max_tokens out of range");
  }
  const auto is_token = [&](std::int64_t token) { return token >= 0 && token < encoder.vocab_size; };
  if (!std::ranges::all_of(special, is_token)) fail_at(where, "encoder has a special token outside its vocabulary");
  if (encoder.size < 1 || encoder.size != manifest.adaptation.conditioning_size) {
    fail_at(where, "encoder.size is not adaptation.conditioning_size");
  }
  if (!(encoder.conditioning_norm >= 0) || !std::isfinite(encoder.conditioning_norm)) {
    fail_at(where, "encoder.conditioning_norm is negative or not finite");
  }
}

static void check_limits(const LimitsSpec& limits, const ModelSpec& model, const std::string& where) {
  for (const std::int64_t limit : {limits.batch, limits.sequence, limits.past, limits.factor_sets}) {
    if (limit < 1) fail_at(where, "limits has a number below 1");
  }
  if (limits.sequence > model.max_positions || limits.past > model.max_positions - 1) {
    fail_at(where, "limits.sequence or limits.past is beyond the model's positions");
  }
}

static void check_files(const Manifest& manifest, const std::string& where) {
  std::set<std::string> needed = {"tokenizer.json", "parity.json", manifest.token_embedding.file};
  for (const auto& [name, graph] : manifest.graphs) needed.insert(graph.file);
  if (manifest.adaptation.regime == "lora") needed.insert("lora.safetensors");
  if (manifest.has_basis()) needed.insert("basis.safetensors");
  if (manifest.encoder) needed.insert(kEncoderTokenizer);
  if (manifest.adaptation.num_clusters > 0) needed.insert("centroids.safetensors");
  for (const std::string& name : needed) {
    if (!manifest.files.contains(name)) fail_at(where, "'" + name + "' is needed but not listed in files");
  }
}

static void check_roles(const Manifest& manifest, const std::string& where) {
  std::set<std::string> roles;
  for (const auto& [name, graph] : manifest.graphs) {
    roles.insert(graph.role);
    if (graph.cache.has_value() != (graph.role == "decoder")) {
      fail_at(where, "graphs." + name + ".cache does not fit its role '" + graph.role + "'");
    }
  }
  if (!roles.contains("decoder")) fail_at(where, "no graph has the role 'decoder'");
  if (manifest.adaptation.regime == "chameleon" && !roles.contains("hypernetwork")) {
    fail_at(where, "no graph has the role 'hypernetwork'");
  }
}

static bool is_power_of_four(std::int64_t number) {
  return number > 0 && std::has_single_bit(static_cast<std::uint64_t>(number)) &&
         std::countr_zero(static_cast<std::uint64_t>(number)) % 2 == 0;
}

static void check_token_embedding(const Manifest& manifest, const std::string& where) {
  const StoredTensor& stored = manifest.token_embedding;
  if (stored.shape != std::vector{manifest.model.vocab_size, manifest.model.hidden_size}) {
    fail_at(where, "token_embedding does not have the shape [vocab_size, hidden_size]");
  }
  const bool int8 = stored.dtype == "int8";
  for (const auto& part : {stored.row_scales_offset, stored.channel_scales_offset, stored.rotation}) {
    if (part.has_value() != int8) {
      fail_at(where, "token_embedding needs offsets of scales and a rotation in int8, and only there");
    }
  }
  if (int8 && (!is_power_of_four(*stored.rotation) || manifest.model.hidden_size % *stored.rotation != 0)) {
    fail_at(where, "token_embedding.rotation is not a power of four that divides hidden_size");
  }
  const std::int64_t item = int8 ? 1 : stored.dtype == "float16" ? 2 : 4;
  const std::int64_t size = manifest.files.at(stored.file).size, rows = stored.shape[0];
  if (!fits(stored.offset, rows, item * stored.shape[1], size) ||
      (int8 && !fits(*stored.row_scales_offset, rows, sizeof(float), size)) ||
      (int8 && !fits(*stored.channel_scales_offset, stored.shape[1], sizeof(float), size))) {
    fail_at(where, "token_embedding lies outside " + stored.file);
  }
}

static void check_consistency(const Manifest& manifest, const std::string& where) {
  check_model(manifest.model, where);
  check_adaptation(manifest.adaptation, manifest.model, where);
  check_adapters(manifest.adaptation, manifest.model, where);
  check_conditioning_size(manifest.adaptation, where);
  check_encoder(manifest, where);
  check_limits(manifest.limits, manifest.model, where);
  check_files(manifest, where);
  check_roles(manifest, where);
  check_token_embedding(manifest, where);
  for (const auto& [name, graph] : manifest.graphs) check_graph(graph, manifest, where + ": graphs." + name);
}

Manifest parse_manifest(std::string_view raw, const std::filesystem::path& where) {
  const std::string at = where.string();
  Manifest manifest;
  try {
    const Json head = Json::parse(raw);
    if (!head.is_object() || head.value("format", Json()) != kFormat) {
      fail_at(at, std::string("\"format\" is not \"") + kFormat + '"');
    }
    if (const Json version = head.value("format_version", Json()); version != kFormatVersion) {
      throw VersionError(at + ": format_version " + version.dump() + ", this release reads " +
                         std::to_string(kFormatVersion) +
                         ": export the checkpoint again or install the matching release");
    }
    read(head, at, manifest);
  } catch (const Json::exception& error) {
    fail_at(at, error.what());
  }
  for (const auto& [name, spec] : manifest.files) {
    if (!is_plain_name(name)) {
      throw PathError(at + ": file name '" + name + "' is not a plain name inside the bundle");
    }
  }
  check_consistency(manifest, at);
  return manifest;
}

}  // namespace chameleon
