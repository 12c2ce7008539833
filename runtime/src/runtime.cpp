#include "chameleon/runtime.h"

#include <algorithm>
#include <atomic>

#include "adaptation.h"
#include "contract/basis.h"
#include "contract/mapped_file.h"
#include "decode/prompt_logprobs.h"
#include "decode/prompt_lookup.h"
#include "decode/scoring.h"
#include "decode/shared_cache.h"
#include "factors.h"
#include "generation.h"
#include "runtime_impl.h"
#ifdef CHAMELEON_WITH_TENSORRT
#include "device/tensorrt.h"
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
  if (!spec.adapters.empty() || spec.regime == "base") return Mode::none;  // rows without an adapter
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

}  // namespace

Runtime::Impl::Impl(OpeningBundle opening, const LoadOptions& options) try
    : bundle(std::move(opening.bundle)),
      tokenizer(load_tokenizer(bundle)),
      adapters(bundle, options.max_adapter_bytes),
      mode(options.mode.value_or(default_mode(bundle.manifest.adaptation))) {
  open_decoder(options);
  if (bundle.manifest.adaptation.regime == "chameleon") {
    hypernetwork = open_session(env, bundle, bundle.graph("hypernetwork", "cpu"), options);  // also for TensorRT
  }
  check_mode(mode, bundle.manifest.adaptation);
  if (mode == Mode::centroid) (void)factors_of_centroids();
  opening.require_weights();
} catch (...) {
  opening.require_weights();  // damaged weights explain any other error, so they are reported first
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
  integer_weights = chameleon::integer_weights(env, bundle, graph);
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

Mode Runtime::Impl::check_arguments(std::optional<Mode> chosen, const std::optional<std::vector<std::string>>& tenants,
                                    const std::optional<Factors>& factors, const std::optional<AdapterNames>& names,
                                    std::size_t batch) const {
  const Mode used = chosen.value_or(names ? Mode::static_ : mode);
  if (names && names->size() != batch) {
    throw InputError(std::to_string(names->size()) + " adapters for " + std::to_string(batch) +
                     " texts: pass one per text, nothing for none");
  }
  if (names && (used != Mode::static_ || factors)) {
    throw ModeError("adapters go with mode 'static' and without factors: pass nothing else with them");
  }
  check_mode(used, bundle.manifest.adaptation);
  check_tenants(used, tenants, batch);
  if (factors && used != Mode::static_) {
    throw ModeError("factors were passed in mode '" + std::string(to_string(used)) + "': pass mode static with them");
  }
  return used;
}

Embedded Runtime::Impl::embed(std::span<const TokenIds> rows) const {
  std::vector<float> embeddings = chameleon::embed(rows, bundle);
  const auto hidden_size = static_cast<std::size_t>(bundle.manifest.model.hidden_size);
  std::vector<std::int64_t> cluster_ids = assign(embeddings, bundle.centroids, hidden_size);
  return {std::move(embeddings), std::move(cluster_ids)};
}

Adaptation Runtime::Impl::adapt(std::span<const TokenIds> rows, const AdaptOptions& options) const {
  const Mode chosen = check_arguments(options.mode, options.tenants, options.factors, options.adapters, rows.size());
  check_conditioning(chosen, options.conditioning, bundle.manifest.adaptation.conditioning_size, rows.size());
  auto [embeddings, cluster_ids] = embed(rows);
  RowFactors factors;
  const std::vector<std::int64_t> first_set(rows.size(), 0);
  if (chosen == Mode::none) {
    factors = {no_factors(bundle.manifest.adaptation), first_set};
  } else if (options.adapters) {
    factors = adapters.of_rows(*options.adapters);
  } else if (chosen == Mode::static_) {
    factors = {static_factors(options.factors), first_set};
  } else if (chosen == Mode::centroid) {
    factors = select(factors_of_centroids(), cluster_ids);
  } else {
    Conditioning given = options.conditioning ? distinct(*options.conditioning)
                                              : conditioning(chosen, embeddings, cluster_ids, options.tenants);
    factors = {generate_factors(given.vectors), std::move(given.factor_ids)};
  }
  return {std::move(embeddings), std::move(cluster_ids), std::move(factors)};
}

std::vector<FactorSource> Runtime::Impl::factor_sources(Mode chosen, const Embedded& embedded,
                                                        const std::optional<std::vector<std::string>>& tenants,
                                                        const std::optional<Factors>& factors,
                                                        const std::optional<AdapterNames>& names) const {
  const std::size_t batch = embedded.cluster_ids.size();
  const FactorSource none{"none", [this] { return no_factors(bundle.manifest.adaptation); }};
  if (chosen == Mode::none) return std::vector<FactorSource>(batch, none);
  if (names) {
    std::vector<FactorSource> sources;
    for (const auto& name : *names) sources.push_back(name ? adapters.source(*name) : none);
    return sources;
  }
  if (chosen == Mode::static_) {
    static std::atomic<std::uint64_t> number = 0;  // a caller's set is shared by the rows of its submit alone
    const std::string key = factors ? "static " + std::to_string(number++) : "static";
    return std::vector<FactorSource>(batch, {key, [sets = static_factors(factors)] { return sets; }});
  }
  std::vector<FactorSource> sources;
  if (chosen == Mode::centroid) {
    for (const std::int64_t id : embedded.cluster_ids) {
      const auto make = [this, id] { return select(factors_of_centroids(), std::span(&id, 1)).sets; };
      sources.push_back({"centroid " + std::to_string(id), make});
    }
    return sources;
  }
  const Conditioning given = conditioning(chosen, embedded.embeddings, embedded.cluster_ids, tenants);
  const std::int64_t width = bundle.manifest.hypernetwork_width();
  for (const std::int64_t id : given.factor_ids) {
    const auto begin = given.vectors.begin() + id * width;
    std::vector<float> vector(begin, begin + width);
    // Equal vectors have equal factors, for any tenant.
    std::string key(reinterpret_cast<const char*>(vector.data()), vector.size() * sizeof(float));
    sources.push_back({"vector " + key, [this, vector = std::move(vector)] { return generate_factors(vector); }});
  }
  return sources;
}

FactorSets Runtime::Impl::static_factors(const std::optional<Factors>& factors) const {
  if (factors) return enter_basis(check_factors(*factors, bundle.manifest.adaptation), bundle.basis);
  if (!bundle.manifest.adaptation.adapters.empty()) {
    throw ModeError("mode 'static' of a bundle with adapters: pass adapters, a name or nothing per text");
  }
  if (bundle.lora.count == 0) {
    throw ModeError("mode 'static' needs factors: this bundle has no trained LoRA");
  }
  return bundle.basis.empty() ? bundle.lora : enter_basis(bundle.lora, bundle.basis);
}

const FactorSets& Runtime::Impl::factors_of_centroids() const {
  std::call_once(centroid_factors_once, [this] { centroid_factors = generate_factors(bundle.centroids); });
  return centroid_factors;
}

/// The factor sets of conditioning vectors [factor_sets, hypernetwork_width], in the memory that ONNX Runtime wrote
/// them to.
FactorSets Runtime::Impl::generate_factors(std::span<const float> conditioning) const {
  const std::int64_t size = bundle.manifest.hypernetwork_width();
  const std::int64_t count = std::ssize(conditioning) / size;
  const auto widths = bundle.manifest.adaptation.factor_widths();
  const char* input_names[] = {"conditioning"};
  const Ort::Value inputs[] = {tensor_over(conditioning, {count, size})};
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
  return bundle.basis.empty() ? sets : enter_basis(sets, bundle.basis);
}

Runtime::Runtime(const std::filesystem::path& path, const LoadOptions& options)
    : impl_((check_provider(options.provider),
             std::make_unique<const Impl>(start_opening(path, options.trusted_keys), options))) {}
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime::~Runtime() = default;

Adaptation Runtime::adapt(Texts texts, const AdaptOptions& options) const {
  return impl_->adapt(impl_->encode(texts), options);
}

std::vector<Score> Runtime::score(Texts texts, const AdaptOptions& options, const std::stop_token& stop) const {
  const std::vector<TokenIds> rows = impl_->encode(texts);
  return score_rows(rows, *impl_->decoder, impl_->adapt(rows, options), stop);
}

std::vector<std::vector<Choice>> Runtime::prompt_logprobs(Texts texts, const RowFactors& factors, int count,
                                                          const std::stop_token& stop) const {
  return chameleon::prompt_logprobs(impl_->encode(texts), *impl_->decoder, factors, count, stop);
}

std::vector<Generation> Runtime::generate(Texts prompts, const GenerateOptions& options) const {
  const std::vector<TokenIds> prompt_ids = impl_->encode(prompts);
  const ModelSpec& model = manifest().model;
  Adaptation adaptation = impl_->adapt(prompt_ids, options);
  std::vector<Row> rows = begin_rows(prompt_ids, adaptation.cluster_ids, options.max_new_tokens, options.sampling, 1,
                                     model.max_positions, model.vocab_size);
  if (options.prompt_lookup_num_tokens != 0) {
    return generate_speculated(std::move(rows), options.prompt_lookup_num_tokens, *impl_->decoder, adaptation.factors,
                               impl_->tokenizer, model.eos_token_id, options.errors, options.on_token, options.stop);
  }
  return generate_rows(std::move(rows), *impl_->decoder, std::move(adaptation.factors), impl_->tokenizer,
                       model.eos_token_id, options.errors, options.on_token, options.stop);
}

void Runtime::load_adapter(const std::string& name, const std::filesystem::path& file) {
  impl_->adapters.load(name, file);
}
void Runtime::unload_adapter(const std::string& name) { impl_->adapters.unload(name); }
std::vector<std::string> Runtime::adapter_names() const { return impl_->adapters.names(); }

std::vector<TokenIds> Runtime::encode(Texts texts) const { return impl_->encode(texts); }
const std::string& Runtime::provider() const { return impl_->provider; }
const std::optional<std::string>& Runtime::integer_weights() const { return impl_->integer_weights; }
const Bundle& Runtime::bundle() const { return impl_->bundle; }
const Manifest& Runtime::manifest() const { return impl_->bundle.manifest; }
const Tokenizer& Runtime::tokenizer() const { return impl_->tokenizer; }

}  // namespace chameleon
