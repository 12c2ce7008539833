#include "factor_sources.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "contract/basis.h"
#include "factors.h"
#include "per_prompt.h"

namespace chameleon {

namespace {

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

}  // namespace

FactorSources::FactorSources(const Bundle& bundle, Ort::Session hypernetwork, std::string provider,
                             const Encoder* encoder, std::optional<Mode> mode,
                             std::optional<std::size_t> max_adapter_bytes)
    : bundle_(bundle),
      spec_(bundle.manifest.adaptation),
      hypernetwork_(std::move(hypernetwork)),
      provider_(std::move(provider)),
      encoder_(encoder),
      mode_(mode.value_or(default_mode(spec_))),
      adapters_(bundle, max_adapter_bytes),
      no_factors_(no_factors(spec_)) {
  check_mode(mode_, spec_);
  if (mode_ == Mode::centroid) (void)factors_of_centroids();
}

Adapt FactorSources::resolve(const Adapt& adapt, std::size_t batch) const {
  Adapt resolved = adapt;
  const Mode mode = adapt.mode.value_or(adapt.adapters ? Mode::static_ : mode_);
  resolved.mode = mode;
  if (adapt.adapters && adapt.adapters->size() != batch) {
    throw InputError(std::to_string(adapt.adapters->size()) + " adapters for " + std::to_string(batch) +
                     " texts: pass one per text, nothing for none");
  }
  if (adapt.adapters && (mode != Mode::static_ || adapt.factors)) {
    throw ModeError("adapters go with mode 'static' and without factors: pass nothing else with them");
  }
  for (const Blend& blend : adapt.adapters.value_or(std::vector<Blend>())) {
    for (const auto& [name, weight] : blend.weights) {
      if (std::isfinite(weight)) continue;
      throw InputError("the weight of adapter '" + name.substr(0, 80) + "' is no finite number");
    }
  }
  if (adapt.adapt_text && adapt.conditioning) {
    throw InputError("adapt_text and conditioning both say what the updates are of: pass one");
  }
  if (adapt.adapt_tokens == 0) throw InputError("adapt_tokens must be at least 1, got 0");
  check_mode(mode, spec_);
  check_tenants(mode, adapt.tenants, batch);
  if (adapt.factors && mode != Mode::static_) {
    throw ModeError("factors were passed in mode '" + std::string(to_string(mode)) + "': pass mode static with them");
  }
  if (adapt.adapt_text) resolved.conditioning = described(mode, *adapt.adapt_text, batch);
  resolved.adapt_text.reset();
  check_conditioning(mode, resolved.conditioning, spec_.conditioning_size, batch);
  return resolved;
}

/// The vectors of descriptions, one for all texts or one per text. Throws ModeError or InputError.
Matrix FactorSources::described(Mode mode, const PerPrompt<std::string>& descriptions, std::size_t batch) const {
  if (encoder_ == nullptr) throw ModeError("adapt_text needs a bundle that was exported with --encoder");
  if (mode != Mode::request) {
    throw ModeError("mode '" + std::string(to_string(mode)) + "' with adapt_text: descriptions go with mode 'request'");
  }
  check_count(descriptions, batch, "adapt_text");
  std::vector<std::string> each;
  for (std::size_t row = 0; row < batch; ++row) each.push_back(value_of(descriptions, row));
  const auto vectors = std::make_shared<const std::vector<float>>(encoder_->conditioning(each));
  return {batch, vectors->size() / batch, *vectors, vectors};
}

Embedded FactorSources::embed(std::span<const TokenIds> rows, const Adapt& adapt) const {
  std::vector<float> embeddings = chameleon::embed(rows, bundle_, adapt.adapt_tokens);
  const auto hidden_size = static_cast<std::size_t>(bundle_.manifest.model.hidden_size);
  std::vector<std::int64_t> cluster_ids = assign(embeddings, bundle_.centroids, hidden_size);
  return {std::move(embeddings), std::move(cluster_ids)};
}

Embedded FactorSources::embed_for_factors(std::span<const TokenIds> rows, const Adapt& adapt) const {
  const AdaptationSpec& spec = bundle_.manifest.adaptation;
  if (spec.regime == "chameleon" || spec.num_clusters > 0) return embed(rows, adapt);
  return {{}, std::vector<std::int64_t>(rows.size(), -1)};
}

Adaptation FactorSources::adapt(std::span<const TokenIds> rows, const Adapt& adapt) const {
  const Adapt resolved = resolve(adapt, rows.size());
  Embedded embedded = embed(rows, resolved);
  const std::vector<std::span<const std::int64_t>> ids(rows.begin(), rows.end());
  RowSources found = of_rows(resolved, ids, embedded);
  return {std::move(embedded.embeddings),
          std::move(embedded.cluster_ids),
          {found.make_all(), std::move(found.factor_ids), std::move(found.starts)}};
}

RowSources FactorSources::of_rows(const Adapt& adapt, Rows rows, const Embedded& embedded) const {
  const Mode mode = adapt.mode.value();
  const std::size_t batch = embedded.cluster_ids.size();
  const auto one = [batch](std::string key, FactorSets sets) {
    const auto make = [sets = std::move(sets)] { return sets; };
    return RowSources{{{std::move(key), make}}, std::vector<std::int64_t>(batch, 0), make};
  };
  if (mode == Mode::none) return one("none", no_factors_);
  if (adapt.adapters) return of_adapters(*adapt.adapters, rows);
  if (mode == Mode::static_) {
    static std::atomic<std::uint64_t> number = 0;  // a caller's set is shared by the rows of its call alone
    return one(adapt.factors ? "static " + std::to_string(number++) : "static", static_factors(adapt.factors));
  }
  RowSources found;
  if (mode == Mode::centroid) {
    std::vector<std::int64_t> present = embedded.cluster_ids;
    std::ranges::sort(present);
    present.erase(std::ranges::unique(present).begin(), present.end());
    for (const std::int64_t id : embedded.cluster_ids) {
      found.factor_ids.push_back(std::ranges::lower_bound(present, id) - present.begin());
    }
    for (const std::int64_t id : present) {
      found.sources.push_back(
          {"centroid " + std::to_string(id), [this, id] { return pick(factors_of_centroids(), std::span(&id, 1)); }});
    }
    found.make_all = [this, present] { return pick(factors_of_centroids(), present); };
    return found;
  }
  Conditioning given = adapt.conditioning
                           ? distinct(*adapt.conditioning)
                           : conditioning(mode, embedded.embeddings, embedded.cluster_ids, adapt.tenants);
  const auto width = static_cast<std::size_t>(bundle_.manifest.hypernetwork_width());
  for (std::size_t start = 0; start < given.vectors.size(); start += width) {
    const auto own = std::span(given.vectors).subspan(start, width);
    // Equal vectors have equal factors, for any tenant.
    found.sources.push_back({"vector " + std::string(reinterpret_cast<const char*>(own.data()), own.size_bytes()),
                             [this, vector = std::vector(own.begin(), own.end())] { return generate(vector); }});
  }
  found.factor_ids = std::move(given.factor_ids);
  found.make_all = [this, vectors = std::move(given.vectors)] { return generate(vectors); };
  return found;
}

RowSources FactorSources::of_adapters(std::span<const Blend> blends, Rows rows) const {
  RowSources found;
  std::map<std::map<std::string, float>, Adapters::Choice> choices;
  std::map<std::string, std::int64_t> places;  // of sources, by key
  std::map<std::map<std::string, float>, std::size_t> texts;
  for (const Blend& blend : blends) ++texts[blend.weights];
  for (std::size_t row = 0; row < blends.size(); ++row) {
    const auto& weights = blends[row].weights;
    if (!choices.contains(weights)) choices.emplace(weights, adapters_.choose(blends[row], texts.at(weights)));
    const Adapters::Choice& chosen = choices.at(weights);
    if (!chosen.invocation_tokens.empty() && provider_ != "cpu") {
      throw ProviderError("activated adapters run on provider 'cpu', not on '" + provider_ + "'");
    }
    const auto start = chosen.start(rows[row]);
    // What nothing activates is the base model, and so is what follows it.
    const FactorSource source = start ? chosen.source : adapters_.choose({}, 0).source;
    const auto [place, is_new] = places.try_emplace(source.key, std::ssize(found.sources));
    if (is_new) found.sources.push_back(source);
    found.factor_ids.push_back(place->second);
    found.starts.push_back(static_cast<std::int64_t>(start.value_or(0)));
  }
  found.make_all = [sources = found.sources] {
    std::vector<FactorSets> stacks;
    for (const FactorSource& source : sources) stacks.push_back(source.make());
    return stack_sets(stacks);
  };
  return found;
}

FactorSets FactorSources::static_factors(const std::optional<Factors>& factors) const {
  if (factors) return enter_basis(check_factors(*factors, spec_), bundle_.basis);
  if (!spec_.adapters.empty()) {
    throw ModeError("mode 'static' of a bundle with adapters: pass adapters, a name or nothing per text");
  }
  if (bundle_.lora.count == 0) {
    throw ModeError("mode 'static' needs factors: this bundle has no trained LoRA");
  }
  return bundle_.basis.empty() ? bundle_.lora : enter_basis(bundle_.lora, bundle_.basis);
}

const FactorSets& FactorSources::factors_of_centroids() const {
  std::call_once(centroid_factors_once_, [this] { centroid_factors_ = generate(bundle_.centroids); });
  return centroid_factors_;
}

/// The factor sets of conditioning vectors [factor_sets, hypernetwork_width], in the memory that ONNX Runtime wrote
/// them to.
FactorSets FactorSources::generate(std::span<const float> vectors) const {
  const std::int64_t size = bundle_.manifest.hypernetwork_width();
  const std::int64_t count = std::ssize(vectors) / size;
  const auto widths = spec_.factor_widths();
  const char* input_names[] = {"conditioning"};
  const Ort::Value inputs[] = {tensor_over(vectors, {count, size})};
  std::vector<const char*> output_names;
  const auto outputs = std::make_shared<std::vector<Ort::Value>>();
  for (const auto& [name, width] : widths) {
    output_names.push_back(name.c_str());
    outputs->emplace_back(nullptr);
  }
  run_session(hypernetwork_, {}, input_names, inputs, output_names, *outputs);
  FactorSets sets{count, spec_.rank, {}, outputs};
  for (std::size_t i = 0; i < outputs->size(); ++i) {
    const Ort::Value& output = outputs->at(i);
    sets.tensors[output_names[i]] = {output.GetTensorData<float>(),
                                     output.GetTensorTypeAndShapeInfo().GetElementCount()};
  }
  return bundle_.basis.empty() ? sets : enter_basis(sets, bundle_.basis);
}

}  // namespace chameleon
