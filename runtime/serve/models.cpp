#include "models.h"

#include <algorithm>
#include <array>
#include <ctime>

#include "chameleon/error.h"

namespace chameleon::serve {

namespace {

/// Factors are never taken from a body, so static needs the bundle's own; a tenant is known by its API key.
std::vector<Mode> served(const Manifest& manifest, bool has_tenants) {
  std::vector<Mode> modes = available_modes(manifest.adaptation);
  std::erase_if(modes, [&](Mode mode) {
    return (mode == Mode::static_ && manifest.adaptation.regime != "lora") || (mode == Mode::tenant && !has_tenants);
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

Models::Models(std::string name, const Manifest& manifest, std::optional<Mode> mode, bool has_tenants)
    : name_(std::move(name)), created_(std::time(nullptr)), max_positions_(manifest.model.max_positions) {
  const std::vector<Mode> modes = served(manifest, has_tenants);
  constexpr std::array preferred = {Mode::centroid, Mode::request, Mode::static_};
  const Mode own = mode.value_or(*std::ranges::find_if(preferred, [&](Mode each) { return contains(modes, each); }));
  if (!contains(modes, own)) {
    throw ModeError("mode '" + std::string(to_string(own)) + "' cannot be served: choose one of " +
                    joined(words_of(modes)));
  }
  modes_.emplace_back(name_, own);
  for (const Mode each : modes) modes_.emplace_back(name_ + ":" + std::string(to_string(each)), each);
}

std::pair<std::string, Mode> Models::resolve(const std::optional<std::string>& model, std::optional<Mode> mode) const {
  const std::string named = model.value_or(name_);
  const auto found = std::ranges::find(modes_, named, &std::pair<std::string, Mode>::first);
  if (found == modes_.end()) {
    std::vector<std::string> names;
    for (const auto& [name, each] : modes_) names.push_back(name);
    throw ApiError(404, "model_not_found", "no model '" + named + "': choose one of " + joined(names), "model");
  }
  if (!mode || *mode == found->second) return *found;
  const std::string word(to_string(*mode));
  if (named != name_) {
    throw ApiError(400, "input_invalid", "model '" + named + "' and mode '" + word + "' contradict each other", "mode");
  }
  if (std::ranges::find(modes_, *mode, &std::pair<std::string, Mode>::second) == modes_.end()) {
    throw ApiError(400, "mode_unavailable", "mode '" + word + "' is not served here", "mode");
  }
  return {named, *mode};
}

Json Models::list() const {
  Json data = Json::array();
  for (const auto& [name, mode] : modes_) data.push_back(describe(name, mode));
  return {{"object", "list"}, {"data", data}};
}

Json Models::get(const std::string& name) const {
  const auto [named, mode] = resolve(name);
  return describe(named, mode);
}

Json Models::describe(const std::string& name, Mode mode) const {
  return {{"id", name},
          {"object", "model"},
          {"created", created_},
          {"owned_by", "chameleon-deploy"},
          {"root", name_},
          {"mode", to_string(mode)},
          {"max_model_len", max_positions_}};
}

}  // namespace chameleon::serve
