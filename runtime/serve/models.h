// Names of models: the bundle's own, one per mode, such as `wiki:none`, and one per adapter, such as `wiki:legal`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/runtime.h"
#include "errors.h"

namespace chameleon::serve {

/// What a request means: the model's name to answer with, the mode, and the adapter if it is one's model.
struct Meant {
  std::string model;
  Mode mode;
  std::optional<std::string> adapter{};
};

/// Which names there are and what each means.
class Models {
 public:
  /// name: the bundle's directory
  /// runtime: must outlive this; its adapters may change
  /// mode: what the name alone means; by default centroid, or the bundle's default where it has no centroids
  /// has_tenants: whether API keys tell of tenants
  /// capacity: tokens of a row that the engine holds; by default, the model's positions
  /// Throws ModeError.
  Models(std::string name, const Runtime& runtime, std::optional<Mode> mode, bool has_tenants,
         std::optional<std::size_t> capacity = {});

  [[nodiscard]] const std::string& name() const { return name_; }
  /// Tokens of a row, prompt and answer.
  [[nodiscard]] std::int64_t max_length() const { return max_length_; }
  [[nodiscard]] Mode default_mode() const { return models_.front().mode; }
  /// Throws ApiError for a name that no model has, or a mode that it does not go with.
  [[nodiscard]] Meant resolve(const std::optional<std::string>& model, std::optional<Mode> mode = {}) const;
  [[nodiscard]] Json list() const;
  /// Throws ApiError.
  [[nodiscard]] Json get(const std::string& name) const;

 private:
  /// The model of a name; none if there is none.
  [[nodiscard]] std::optional<Meant> find(const std::string& named) const;
  [[nodiscard]] std::vector<Meant> all() const;
  [[nodiscard]] Json describe(const Meant& model) const;

  std::string name_;
  const Runtime& runtime_;
  std::vector<Meant> models_;  // without those of adapters; the bundle's own is first
  std::int64_t created_, max_length_;
};

}  // namespace chameleon::serve
