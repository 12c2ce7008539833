#include "keys.h"

#include <strings.h>

#include "chameleon/error.h"
#include "errors.h"
#include "mapped_file.h"

namespace chameleon::serve {

namespace {

/// By digest: how long a look-up takes then tells nothing of a key.
std::string digest(std::string_view key) { return sha256(std::as_bytes(std::span(key))); }

Json read_object(const std::filesystem::path& file) {
  if (!std::filesystem::is_regular_file(file)) throw InputError("cannot read " + file.string() + ": no such file");
  try {
    Json keys = Json::parse(MappedFile(file).text());
    if (keys.is_object()) return keys;
  } catch (const MissingFileError& error) {
    throw InputError(error.what());
  } catch (const Json::exception&) {
  }
  throw InputError(file.string() + ": expected a JSON object {\"key\": \"tenant\"}");
}

}  // namespace

Keys::Keys(const std::optional<std::filesystem::path>& file) {
  if (!file) return;
  tenants_.emplace();
  const Json object = read_object(*file);
  for (const auto& [key, tenant] : object.items()) {
    if (!tenant.is_string()) throw InputError(file->string() + ": the tenant of a key must be a string");
    if (key.empty() || tenant == "") throw InputError(file->string() + ": holds an empty key or tenant");
    tenants_->emplace(digest(key), tenant.get<std::string>());
  }
  if (tenants_->empty()) throw InputError(file->string() + ": needs at least one key");
}

std::optional<std::string> Keys::tenant(const std::string& authorization) const {
  if (!tenants_) return std::nullopt;
  const std::size_t space = authorization.find(' ');
  const std::size_t first = authorization.find_first_not_of(" \t", space);
  if (first != std::string::npos && ::strcasecmp(authorization.substr(0, space).c_str(), "bearer") == 0) {
    const std::size_t last = authorization.find_last_not_of(" \t");
    const auto found = tenants_->find(digest(std::string_view(authorization).substr(first, last + 1 - first)));
    if (found != tenants_->end()) return found->second;
  }
  throw ApiError(401, "invalid_api_key", "pass a valid API key: Authorization: Bearer KEY");
}

}  // namespace chameleon::serve
