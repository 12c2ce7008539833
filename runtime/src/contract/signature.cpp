#include "contract/signature.h"

#include <algorithm>

#include "contract/json_fields.h"
#include "contract/precision.h"
#include "factors.h"

namespace chameleon {

namespace {

struct Signature {
  std::vector<TensorSpec> inputs, outputs;
};

std::string text_of(const TensorSpec& tensor) {
  std::string text = tensor.dtype + " [";
  for (const Dimension& dimension : tensor.shape) {
    if (text.back() != '[') text += ", ";
    const auto* number = std::get_if<std::int64_t>(&dimension);
    text += number != nullptr ? std::to_string(*number) : std::get<std::string>(dimension);
  }
  return text + "]";
}

/// Add the factor tensors whose names begin with `prefix`.
/// is_flat: whether those of the trunk have one axis for sets and rank, whose sets column_ids tells
void add_factors(std::vector<TensorSpec>& inputs, const AdaptationSpec& spec, const std::string& prefix = "",
                 bool is_flat = false) {
  bool has_columns = false;
  for (const auto& [name, width] : spec.factor_widths()) {
    if (!name.starts_with(prefix)) continue;
    const bool has_column_axis = is_flat && !in_head(name);
    has_columns |= has_column_axis;
    inputs.push_back(has_column_axis ? TensorSpec{name, "float32", {"columns", width}}
                                     : TensorSpec{name, "float32", {"factor_sets", "rank", width}});
  }
  if (has_columns) inputs.push_back({"column_ids", "int64", {"columns"}});
}

/// The element type of a decoder's cache. The CPU has no 16-bit kernels, so its cache is float32.
std::string cache_dtype(const GraphSpec& graph, const std::string& precision) {
  if (graph.cache == "shared") return is_integer(precision) ? "int8" : "float32";
  const bool on_cpu = std::ranges::find(graph.providers, "cpu") != graph.providers.end();
  if (on_cpu || precision == "fp32" || is_integer(precision)) return "float32";
  return precision == "fp16" ? "float16" : "bfloat16";
}

Signature decoder_signature(const GraphSpec& graph, const Manifest& manifest) {
  const ModelSpec& model = manifest.model;
  const bool is_shared = graph.cache == "shared";
  Signature decoder;
  decoder.inputs = {{"input_ids", "int64", {"batch", "sequence"}},
                    {"position_ids", "int64", {"batch", "sequence"}},
                    {"logits_positions", "int64", {"batch", "positions"}},
                    {"factor_ids", "int64", {"batch"}}};  // without targets nothing reads them
  if (is_shared) {
    decoder.inputs.push_back({"seqlens_k", "int32", {"batch"}});
    decoder.inputs.push_back({"total_sequence_length", "int32", {}});
    decoder.inputs.push_back({"num_logits", "int64", {1}});
    decoder.outputs = {{"logits", "float32", {"batch*positions", model.vocab_size}},
                       {"hidden_states", "float32", {"batch", "positions", model.hidden_size}}};
  } else {
    decoder.inputs.push_back({"attention_mask", "int64", {"batch", "total"}});
    decoder.outputs = {{"logits", "float32", {"batch", "positions", model.vocab_size}}};
  }
  add_factors(decoder.inputs, manifest.adaptation, "", is_shared);
  const std::string dtype = cache_dtype(graph, manifest.precision);
  const auto cached = [&](const std::string& name, const char* width) {
    return TensorSpec{name, dtype, {"batch", model.num_key_value_heads, width, model.head_dim}};
  };
  for (std::int64_t layer = 0; layer < model.num_layers; ++layer) {
    for (const char* kind : {".key", ".value"}) {
      const std::string name = "." + std::to_string(layer) + kind;
      decoder.inputs.push_back(cached("past_key_values" + name, is_shared ? "capacity" : "past"));
      decoder.outputs.push_back(cached("present" + name, is_shared ? "capacity" : "total"));
    }
  }
  return decoder;
}

Signature hypernetwork_signature(const Manifest& manifest) {
  Signature hypernetwork;
  hypernetwork.inputs = {{"conditioning", "float32", {"factor_sets", manifest.hypernetwork_width()}}};
  for (const auto& [name, width] : manifest.adaptation.factor_widths()) {
    hypernetwork.outputs.push_back({name, "float32", {"factor_sets", manifest.adaptation.rank, width}});
  }
  return hypernetwork;
}

Signature hidden_scorer_signature(const Manifest& manifest) {
  Signature scorer;
  scorer.inputs = {{"hidden_states", "float32", {"positions", manifest.model.hidden_size}},
                   {"targets", "int64", {"positions"}}};
  add_factors(scorer.inputs, manifest.adaptation, "lm_head.");
  if (scorer.inputs.size() > 2) scorer.inputs.push_back({"factor_ids", "int64", {"positions"}});
  scorer.outputs = {{"logprobs", "float32", {"positions"}}};
  return scorer;
}

Signature signature_of(const GraphSpec& graph, const Manifest& manifest) {
  if (graph.role == "decoder") return decoder_signature(graph, manifest);
  if (graph.role == "hypernetwork") return hypernetwork_signature(manifest);
  if (graph.role == "hidden_scorer") return hidden_scorer_signature(manifest);
  if (graph.role == "encoder") {
    return {{{"input_ids", "int64", {"batch", "sequence"}}},
            {{"embeddings", "float32", {"batch", manifest.adaptation.conditioning_size}}}};
  }
  const std::vector<Dimension> each = {"batch", "positions"};
  const TensorSpec logits{"logits", "float32", {"batch", "positions", manifest.model.vocab_size}};
  if (graph.role == "chooser") return {{logits}, {{"token_ids", "int64", each}}};
  return {{logits, {"targets", "int64", each}}, {{"logprobs", "float32", each}}};  // logits_scorer
}

void check_tensors(const std::vector<TensorSpec>& expected, const std::vector<TensorSpec>& actual,
                   const std::string& where) {
  if (const auto found = difference(expected, actual)) {
    fail_at(where, *found + ": it does not fit the rest of the manifest, export again");
  }
}

}  // namespace

std::optional<std::string> difference(const std::vector<TensorSpec>& expected, const std::vector<TensorSpec>& actual) {
  const auto find = [](const std::vector<TensorSpec>& tensors, const std::string& name) {
    return std::ranges::find(tensors, name, &TensorSpec::name);
  };
  for (const TensorSpec& tensor : expected) {
    const auto found = find(actual, tensor.name);
    if (found == actual.end()) return "'" + tensor.name + "' is missing";
    if (*found != tensor) return "'" + tensor.name + "' is " + text_of(*found) + ", not " + text_of(tensor);
  }
  for (const TensorSpec& tensor : actual) {
    if (find(expected, tensor.name) == expected.end()) return "'" + tensor.name + "' is unknown";
  }
  if (actual.size() != expected.size()) return "a name is listed twice";
  return std::nullopt;
}

void check_graph(const GraphSpec& graph, const Manifest& manifest, const std::string& where) {
  // Checked first: it bounds the length of the lists that decoder_signature makes.
  if (graph.role == "decoder" && manifest.model.num_layers > static_cast<std::int64_t>(graph.inputs.size())) {
    fail_at(where, "fewer inputs than model.num_layers: export again");
  }
  if (graph.cache == "shared" && manifest.precision != "fp32" && !is_integer(manifest.precision)) {
    fail_at(where, "a shared cache does not exist in precision " + manifest.precision);
  }
  const Signature expected = signature_of(graph, manifest);
  check_tensors(expected.inputs, graph.inputs, where + ".inputs");
  check_tensors(expected.outputs, graph.outputs, where + ".outputs");
}

}  // namespace chameleon
