#include "models.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <ranges>

#include "chameleon/error.h"

namespace chameleon::serve {

namespace {

constexpr std::size_t kMaxNames = 20;  // in a message

/// Factors are never taken from a body, so static needs the bundle's own, and without a name of an adapter; a tenant is
/// known by its API key.
std::vector<Mode> served(const Manifest& manifest, bool has_tenants) {
  std::vector<Mode> modes = available_modes(manifest.adaptation);
  std::erase_if(modes, [&](Mode mode) {
    const bool has_static = manifest.adaptation.regime == "lora" && manifest.adaptation.adapters.empty();
    return (mode == Mode::static_ && !has_static) || (mode == Mode::tenant && !has_tenants);
  });
  return modes;
}

bool contains(const std::vector<Mode>& modes, Mode mode) { return std::ranges::find(modes, mode) != modes.end(); }

/// The names that models are chosen by, or the words of modes.
std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::vector<std::string> words_of(const std::vector<Mode>& modes) {
  std::vector<std::string> words;
  for (const Mode mode : modes) words.emplace_back(to_string(mode));
  return words;
}

}  // namespace

Models::Models(std::string name, const Runtime& runtime, std::optional<Mode> mode, bool has_tenants,
               std::optional<std::size_t> capacity)
    : name_(std::move(name)), runtime_(runtime), created_(std::time(nullptr)) {
  const std::int64_t positions = runtime.manifest().model.max_positions;
  max_length_ = std::min<std::int64_t>(positions, capacity ? *capacity : positions);
  const std::vector<Mode> modes = served(runtime.manifest(), has_tenants);
  constexpr std::array preferred = {Mode::centroid, Mode::request, Mode::static_, Mode::none};
  const Mode own = mode.value_or(*std::ranges::find_if(preferred, [&](Mode each) { return contains(modes, each); }));
  if (!contains(modes, own)) {
    throw ModeError("mode '" + std::string(to_string(own)) + "' cannot be served: choose one of " +
                    joined(words_of(modes)));
  }
  models_.push_back({name_, own});
  for (const Mode each : modes) models_.push_back({name_ + ":" + std::string(to_string(each)), each});
}

std::optional<Meant> Models::find(const std::string& named) const {
  const auto found = std::ranges::find(models_, named, &Meant::model);
  if (found != models_.end()) return *found;
  if (!named.starts_with(name_ + ":")) return std::nullopt;
  const std::string adapter = named.substr(name_.size() + 1);
  return runtime_.has_adapter(adapter) ? std::optional(Meant{named, Mode::static_, adapter}) : std::nullopt;
}

std::vector<Meant> Models::all() const {
  std::vector<Meant> models = models_;
  for (const std::string& adapter : runtime_.adapter_names()) {
    models.push_back({name_ + ":" + adapter, Mode::static_, adapter});
  }
  return models;
}

Meant Models::resolve(const std::optional<std::string>& model, std::optional<Mode> mode) const {
  const std::string named = model.value_or(name_);
  const std::optional<Meant> found = find(named);
  if (!found) {
    std::vector<std::string> names;
    for (const Meant& each : all() | std::views::take(kMaxNames)) names.push_back(each.model);
    throw ApiError(404, "model_not_found", "no model '" + named + "': choose one of " + joined(names), "model");
  }
  if (!mode || *mode == found->mode) return *found;
  const std::string word(to_string(*mode));
  if (named != name_) {
    throw ApiError(400, "input_invalid", "model '" + named + "' and mode '" + word + "' contradict each other", "mode");
  }
  if (std::ranges::find(models_, *mode, &Meant::mode) == models_.end())
    throw ApiError(400, "mode_unavailable", "mode '" + word + "' is not served here", "mode");
  return {named, *mode};
}

Json Models::list() const {
  Json data = Json::array();
  for (const Meant& model : all()) data.push_back(describe(model));
  return {{"object", "list"}, {"data", data}};
}

Json Models::get(const std::string& name) const { return describe(resolve(name)); }

Json Models::describe(const Meant& model) const {
  return {{"id", model.model},
          {"object", "model"},
          {"created", created_},
          {"owned_by", "chameleon-deploy"},
          {"root", name_},
          {"mode", to_string(model.mode)},
          {"max_model_len", max_length_}};
}

}  // namespace chameleon::serve
