// API keys: a file maps each key to its tenant.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

namespace chameleon::serve {

/// Who may call, and for which tenant. Without a file everybody may, for no tenant.
class Keys {
 public:
  /// file: a JSON object of keys and tenants. Throws InputError.
  explicit Keys(const std::optional<std::filesystem::path>& file);

  [[nodiscard]] bool are_required() const { return tenants_.has_value(); }
  /// The tenant of an Authorization header. Throws ApiError.
  [[nodiscard]] std::optional<std::string> tenant(const std::string& authorization) const;

 private:
  std::optional<std::map<std::string, std::string>> tenants_;  // by digest of the key
};

}  // namespace chameleon::serve
