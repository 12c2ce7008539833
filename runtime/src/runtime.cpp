#include "chameleon/runtime.h"

#include <algorithm>
#include <mutex>

#include "adaptation.h"
#include "decoder.h"
#include "factors.h"
#include "generation.h"
#include "mapped_file.h"
#include "sampling.h"
#include "scoring.h"
#include "shared_cache.h"
#ifdef CHAMELEON_WITH_TENSORRT
#include "tensorrt.h"
#endif

namespace chameleon {

namespace {

Tokenizer load_tokenizer(const Bundle& bundle) {
  const std::filesystem::path path = bundle.path / "tokenizer.json";
  try {
    return Tokenizer(MappedFile(path).text());
  } catch (const ManifestError& error) {
    throw ManifestError(path.parent_path().string() + ": " + error.what());
  }
}

bool is_available(Mode mode, const AdaptationSpec& spec) {
  const std::vector<Mode> modes = available_modes(spec);
  return std::ranges::find(modes, mode) != modes.end();
}

Mode default_mode(const AdaptationSpec& spec) {
  for (const Mode mode : {Mode::cohort, Mode::request}) {
    if (is_available(mode, spec)) return mode;
  }
  return Mode::static_;
}

void check_mode(Mode mode, const AdaptationSpec& spec) {
  if (is_available(mode, spec)) return;
  std::string available;
  for (const Mode choice : available_modes(spec))
    available += (available.empty() ? "" : ", ") + std::string(to_string(choice));
  throw ModeError("mode '" + std::string(to_string(mode)) + "' cannot be served by this bundle of regime '" +
                  spec.regime + "' with " + std::to_string(spec.num_clusters) + " clusters: choose one of " +
                  available);
}

void check_row(std::size_t row, const TokenIds& ids, const ModelSpec& model) {
  const std::string text = "text " + std::to_string(row);
  if (ids.empty()) throw InputError(text + " is empty: every text needs at least one token");
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= model.vocab_size) {
      throw TokenError(text + ": token id " + std::to_string(id) + " is outside the vocabulary of " +
                       std::to_string(model.vocab_size));
    }
  }
  if (static_cast<std::int64_t>(ids.size()) > model.max_positions) {
    throw LengthError(text + " has " + std::to_string(ids.size()) + " tokens, the model has " +
                      std::to_string(model.max_positions) + " positions");
  }
}

/// One value for all rows, or one for each.
template <class T>
const T& value_of(const std::variant<T, std::vector<T>>& values, std::size_t row) {
  const auto* each = std::get_if<std::vector<T>>(&values);
  return each != nullptr ? each->at(row) : std::get<T>(values);
}

template <class T>
void check_count(const std::variant<T, std::vector<T>>& values, std::size_t batch, const char* name) {
  const auto* each = std::get_if<std::vector<T>>(&values);
  if (each != nullptr && each->size() != batch) {
    throw InputError(std::to_string(each->size()) + " values of " + name + " for " + std::to_string(batch) +
                     " prompts: pass one, or one per prompt");
  }
}

}  // namespace

struct Runtime::Impl {
  Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "chameleon"};
  Bundle bundle;
  Tokenizer tokenizer;
  Mode mode;
  std::string provider;  // the one that runs the decoder
  std::unique_ptr<const Decoder> decoder;
  Ort::Session hypernetwork{nullptr};
  mutable std::once_flag centroid_factors_once;
  mutable FactorSets centroid_factors;

  Impl(const std::filesystem::path& path, const LoadOptions& options);
  void open_decoder(const LoadOptions& options);
  [[nodiscard]] std::vector<TokenIds> encode(const Texts& texts) const;
  [[nodiscard]] Adaptation adapt(std::span<const TokenIds> rows, const AdaptOptions& options) const;
  [[nodiscard]] FactorSets static_factors(const std::optional<Factors>& factors) const;
  [[nodiscard]] const FactorSets& factors_of_centroids() const;
  [[nodiscard]] FactorSets generate_factors(std::span<const float> conditioning) const;
};

Runtime::Impl::Impl(const std::filesystem::path& path, const LoadOptions& options)
    : bundle(open_bundle(path)),
      tokenizer(load_tokenizer(bundle)),
      mode(options.mode.value_or(default_mode(bundle.manifest.adaptation))) {
  open_decoder(options);
  if (bundle.manifest.adaptation.regime == "chameleon") {
    hypernetwork = open_session(env, bundle, bundle.graph("hypernetwork", "cpu"), options);  // also for TensorRT
  }
  check_mode(mode, bundle.manifest.adaptation);
  if (mode == Mode::centroid) (void)factors_of_centroids();
}

void Runtime::Impl::open_decoder(const LoadOptions& options) {
#ifdef CHAMELEON_WITH_TENSORRT
  if (options.provider == "tensorrt" || options.provider == "auto") {
    try {
      decoder = open_tensorrt(bundle);
      provider = "tensorrt";
      return;
    } catch (const ProviderError&) {
      if (options.provider == "tensorrt") throw;
    }
  }
#endif
  provider = "cpu";
  const GraphSpec& graph = bundle.graph("decoder", provider);
  if (graph.cache != "shared") {
    throw ManifestError(graph.file +
                        " has a growing cache, which this runtime does not support: export with --precision fp32 "
                        "or int8");
  }
  TiledScorer scorer(open_session(env, bundle, bundle.graph("hidden_scorer", provider), options),
                     bundle.manifest.model);
  decoder = std::make_unique<const SharedCacheDecoder>(open_session(env, bundle, graph, options), std::move(scorer),
                                                       bundle.manifest);
}

std::vector<TokenIds> Runtime::Impl::encode(const Texts& texts) const {
  std::vector<TokenIds> rows;
  if (const auto* strings = std::get_if<std::span<const std::string>>(&texts)) {
    for (const std::string& text : *strings) {
      try {
        rows.push_back(tokenizer.encode(text));
      } catch (const InputError& error) {
        throw InputError("text " + std::to_string(rows.size()) + ": " + error.what());
      }
    }
  } else {
    const auto given = std::get<std::span<const TokenIds>>(texts);
    rows.assign(given.begin(), given.end());
  }
  if (rows.empty()) throw InputError("the batch is empty: pass at least one text");
  for (std::size_t row = 0; row < rows.size(); ++row) check_row(row, rows[row], bundle.manifest.model);
  return rows;
}

Adaptation Runtime::Impl::adapt(std::span<const TokenIds> rows, const AdaptOptions& options) const {
  const ModelSpec& model = bundle.manifest.model;
  const Mode chosen = options.mode.value_or(mode);
  check_mode(chosen, bundle.manifest.adaptation);
  check_tenants(chosen, options.tenants, rows.size());
  if (options.factors && chosen != Mode::static_) {
    throw ModeError("factors were passed in mode '" + std::string(to_string(chosen)) + "': pass mode static with them");
  }
  Adaptation adaptation;
  adaptation.embeddings = embed(rows, bundle);
  adaptation.cluster_ids = assign(adaptation.embeddings, bundle.centroids, static_cast<std::size_t>(model.hidden_size));
  const std::vector<std::int64_t> first_set(rows.size(), 0);
  if (chosen == Mode::none) {
    adaptation.factors = {no_factors(bundle.manifest.adaptation), first_set};
  } else if (chosen == Mode::static_) {
    adaptation.factors = {static_factors(options.factors), first_set};
  } else if (chosen == Mode::centroid) {
    adaptation.factors = select(factors_of_centroids(), adaptation.cluster_ids);
  } else {
    Conditioning given = conditioning(chosen, adaptation.embeddings, adaptation.cluster_ids, options.tenants);
    adaptation.factors = {generate_factors(given.vectors), std::move(given.factor_ids)};
  }
  return adaptation;
}

FactorSets Runtime::Impl::static_factors(const std::optional<Factors>& factors) const {
  if (factors) return check_factors(*factors, bundle.manifest.adaptation);
  if (bundle.lora.count == 0) {
    throw ModeError("mode 'static' needs factors: this bundle has no trained LoRA");
  }
  return bundle.lora;
}

const FactorSets& Runtime::Impl::factors_of_centroids() const {
  std::call_once(centroid_factors_once, [this] { centroid_factors = generate_factors(bundle.centroids); });
  return centroid_factors;
}

/// The factor sets of conditioning vectors [factor_sets, hidden], in the memory that ONNX Runtime wrote them to.
FactorSets Runtime::Impl::generate_factors(std::span<const float> conditioning) const {
  const std::int64_t hidden_size = bundle.manifest.model.hidden_size;
  const std::int64_t count = static_cast<std::int64_t>(conditioning.size()) / hidden_size;
  const auto widths = bundle.manifest.adaptation.factor_widths();
  const char* input_names[] = {"conditioning"};
  const Ort::Value inputs[] = {tensor_over(conditioning, {count, hidden_size})};
  std::vector<const char*> output_names;
  const auto outputs = std::make_shared<std::vector<Ort::Value>>();
  for (const auto& [name, width] : widths) {
    output_names.push_back(name.c_str());
    outputs->emplace_back(nullptr);
  }
  run_session(hypernetwork, {}, input_names, inputs, output_names, *outputs);
  FactorSets sets{count, bundle.manifest.adaptation.rank, {}, outputs};
  for (std::size_t i = 0; i < outputs->size(); ++i) {
    const Ort::Value& output = outputs->at(i);
    sets.tensors[output_names[i]] = {output.GetTensorData<float>(),
                                     output.GetTensorTypeAndShapeInfo().GetElementCount()};
  }
  return sets;
}

Runtime::Runtime(const std::filesystem::path& path, const LoadOptions& options)
    : impl_((check_provider(options.provider), std::make_unique<const Impl>(path, options))) {}
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime::~Runtime() = default;

Adaptation Runtime::adapt(Texts texts, const AdaptOptions& options) const {
  return impl_->adapt(impl_->encode(texts), options);
}

std::vector<Score> Runtime::score(Texts texts, const AdaptOptions& options, const std::stop_token& stop) const {
  const std::vector<TokenIds> rows = impl_->encode(texts);
  return score_rows(rows, *impl_->decoder, impl_->adapt(rows, options), stop);
}

std::vector<Generation> Runtime::generate(Texts prompts, const GenerateOptions& options) const {
  const std::vector<TokenIds> prompt_ids = impl_->encode(prompts);
  check_count(options.max_new_tokens, prompt_ids.size(), "max_new_tokens");
  check_count(options.sampling, prompt_ids.size(), "sampling");
  for (std::size_t i = 0; i < prompt_ids.size(); ++i) {
    check(value_of(options.sampling, i), manifest().model.vocab_size);
    if (value_of(options.max_new_tokens, i) < 1) throw InputError("max_new_tokens must be at least 1");
  }
  const Adaptation adaptation = impl_->adapt(prompt_ids, options);
  const ModelSpec& model = manifest().model;
  const bool single = std::holds_alternative<Sampling>(options.sampling);
  std::vector<Row> rows;
  rows.reserve(prompt_ids.size());
  for (std::size_t i = 0; i < prompt_ids.size(); ++i) {
    // The last new token is never fed back, so it needs no position.
    const std::int64_t room = model.max_positions - static_cast<std::int64_t>(prompt_ids[i].size()) + 1;
    rows.emplace_back(prompt_ids[i], std::min(value_of(options.max_new_tokens, i), room), value_of(options.sampling, i),
                      single ? i : 0, adaptation.cluster_ids[i]);
  }
  stream_tokens(rows, *impl_->decoder, adaptation, impl_->tokenizer, model.eos_token_id, options.on_token,
                options.stop);
  std::vector<Generation> generations;
  generations.reserve(rows.size());
  for (Row& row : rows) generations.push_back(std::move(row.generation()));
  return generations;
}

std::vector<TokenIds> Runtime::encode(Texts texts) const { return impl_->encode(texts); }
const std::string& Runtime::provider() const { return impl_->provider; }
const Bundle& Runtime::bundle() const { return impl_->bundle; }
const Manifest& Runtime::manifest() const { return impl_->bundle.manifest; }
const Tokenizer& Runtime::tokenizer() const { return impl_->tokenizer; }

}  // namespace chameleon
