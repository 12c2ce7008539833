// Names of models: the bundle's own, and one per mode, such as `wiki:none`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "chameleon/manifest.h"
#include "errors.h"

namespace chameleon::serve {

/// Which names there are and the mode that each means.
class Models {
 public:
  /// name: the bundle's directory
  /// mode: what the name alone means; by default centroid, or the bundle's default where it has no centroids
  /// has_tenants: whether API keys tell of tenants
  /// Throws ModeError.
  Models(std::string name, const Manifest& manifest, std::optional<Mode> mode, bool has_tenants);

  [[nodiscard]] Mode default_mode() const { return modes_.front().second; }
  /// The name to answer with and the mode that is meant. Throws ApiError.
  [[nodiscard]] std::pair<std::string, Mode> resolve(const std::optional<std::string>& model,
                                                     std::optional<Mode> mode = {}) const;
  [[nodiscard]] Json list() const;
  /// Throws ApiError.
  [[nodiscard]] Json get(const std::string& name) const;

 private:
  [[nodiscard]] Json describe(const std::string& name, Mode mode) const;

  std::string name_;
  std::vector<std::pair<std::string, Mode>> modes_;  // by name; the bundle's own is first
  std::int64_t created_, max_positions_;
};

}  // namespace chameleon::serve
