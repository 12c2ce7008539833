#include "chameleon/runtime.h"

#include "decode/scoring.h"
#include "decode/shared_cache.h"
#include "engine/loop.h"
#include "inputs.h"
#include "runtime_impl.h"
#ifdef CHAMELEON_WITH_TENSORRT
#include "device/tensorrt.h"
#endif

namespace chameleon {

namespace {

Backend open_backend(const Ort::Env& env, const Bundle& bundle, const LoadOptions& options) {
#ifdef CHAMELEON_WITH_TENSORRT
  if (options.provider == "tensorrt" || options.provider == "auto") {
    try {
      return {"tensorrt", {}, open_tensorrt(bundle)};
    } catch (const ProviderError&) {
      if (options.provider == "tensorrt") throw;
    }
  }
#endif
  const GraphSpec& graph = bundle.graph("decoder", "cpu");
  if (graph.cache != "shared") {
    throw ManifestError(graph.file +
                        " has a growing cache, which this runtime does not support: export with --precision fp32"
                        ", int8 or int4");
  }
  auto weights = integer_weights(env, bundle, graph);
  TiledScorer scorer(open_session(env, bundle, bundle.graph("hidden_scorer", "cpu"), options), bundle.manifest.model);
  auto decoder = std::make_unique<const SharedCacheDecoder>(open_session(env, bundle, graph, options),
                                                            std::move(scorer), bundle.manifest);
  return {"cpu", std::move(weights), std::move(decoder)};
}

Ort::Session open_hypernetwork(const Ort::Env& env, const Bundle& bundle, const LoadOptions& options) {
  if (bundle.manifest.adaptation.regime != "chameleon") return Ort::Session(nullptr);
  return open_session(env, bundle, bundle.graph("hypernetwork", "cpu"), options);  // also for TensorRT
}

}  // namespace

Runtime::Impl::Impl(OpeningBundle opening, const LoadOptions& options) try
    : bundle(std::move(opening.bundle)),
      tokenizer(load_tokenizer(bundle.path / "tokenizer.json")),
      backend(open_backend(env, bundle, options)),
      encoder(bundle.manifest.encoder ? std::make_unique<const Encoder>(env, bundle, options) : nullptr),
      sources(bundle, open_hypernetwork(env, bundle, options), backend.provider, encoder.get(), options.mode,
              options.max_adapter_bytes) {
  opening.require_weights();
} catch (...) {
  opening.require_weights();  // damaged weights explain any other error, so they are reported first
}

std::vector<TokenIds> Runtime::Impl::encode(const Texts& texts) const {
  return chameleon::encode(texts, tokenizer, bundle.manifest.model);
}

Runtime::Runtime(const std::filesystem::path& path, const LoadOptions& options)
    : impl_((check_provider(options.provider),
             std::make_unique<const Impl>(start_opening(path, options.trusted_keys), options))) {}
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime::~Runtime() = default;

Adaptation Runtime::adapt(Texts texts, const Adapt& adapt) const {
  return impl_->sources.adapt(impl_->encode(texts), adapt);
}

std::vector<Score> Runtime::score(Texts texts, const Adapt& adapt, const std::stop_token& stop) const {
  const std::vector<TokenIds> rows = impl_->encode(texts);
  return score_rows(rows, *impl_->backend.decoder, impl_->sources.adapt(rows, adapt), stop);
}

std::vector<std::vector<Choice>> Runtime::prompt_logprobs(Texts texts, const RowFactors& factors, int count,
                                                          const std::stop_token& stop) const {
  return chameleon::prompt_logprobs(impl_->encode(texts), *impl_->backend.decoder, factors, count, stop);
}

std::vector<Generation> Runtime::generate(Texts prompts, const Generate& generate, const Adapt& adapt, OnError errors,
                                          const std::stop_token& stop) const {
  return stream(prompts, {}, generate, adapt, errors, stop);
}

std::vector<Generation> Runtime::stream(Texts prompts, const OnToken& on_token, const Generate& generate,
                                        const Adapt& adapt, OnError errors, const std::stop_token& stop) const {
  const auto positions = static_cast<std::size_t>(manifest().model.max_positions);
  return generate_rows(*impl_, prepare(*impl_, prompts, generate, adapt, positions, on_token, stop), errors);
}

void Runtime::load_adapter(const std::string& name, const std::filesystem::path& path, bool replace) {
  impl_->sources.adapters().load(name, path, replace);
}
void Runtime::unload_adapter(const std::string& name) { impl_->sources.adapters().unload(name); }
std::vector<std::string> Runtime::adapter_names() const {
  std::vector<std::string> names;
  for (const AdapterInfo& adapter : adapters()) names.push_back(adapter.name);
  return names;
}
std::vector<AdapterInfo> Runtime::adapters() const { return impl_->sources.adapters().list(); }

std::vector<TokenIds> Runtime::encode(Texts texts) const { return impl_->encode(texts); }
const std::string& Runtime::provider() const { return impl_->backend.provider; }
const std::optional<std::string>& Runtime::integer_weights() const { return impl_->backend.integer_weights; }
const Bundle& Runtime::bundle() const { return impl_->bundle; }
const Manifest& Runtime::manifest() const { return impl_->bundle.manifest; }
const Tokenizer& Runtime::tokenizer() const { return impl_->tokenizer; }

}  // namespace chameleon
