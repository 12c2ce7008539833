// Strict reading of JSON objects: a missing field, a wrong type and an unknown field are errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "chameleon/error.h"

namespace chameleon {

using Json = nlohmann::json;

[[noreturn]] inline void fail_at(const std::string& at, const std::string& problem) {
  throw ManifestError(at + ": " + problem);
}

inline void read(const Json& json, const std::string& at, std::string& value) {
  if (!json.is_string()) fail_at(at, "must be a string");
  value = json.get<std::string>();
}

inline void read(const Json& json, const std::string& at, bool& value) {
  if (!json.is_boolean()) fail_at(at, "must be true or false");
  value = json.get<bool>();
}

inline void read(const Json& json, const std::string& at, std::int64_t& value) {
  // nlohmann converts floats, booleans and unsigned numbers out of range silently.
  if (!json.is_number_integer() ||
      (json.is_number_unsigned() && json.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max())) {
    fail_at(at, "must be an integer of 64 bits");
  }
  value = json.get<std::int64_t>();
}

inline void read(const Json& json, const std::string& at, double& value) {
  if (!json.is_number()) fail_at(at, "must be a number");
  value = json.get<double>();
}

inline void read(const Json& json, const std::string& at, std::variant<std::int64_t, std::string>& value) {
  json.is_string() ? read(json, at, value.emplace<std::string>()) : read(json, at, value.emplace<std::int64_t>());
}

template <class T>
void read(const Json& json, const std::string& at, std::optional<T>& value) {
  if (!json.is_null()) read(json, at, value.emplace());
}

template <class T>
void read(const Json& json, const std::string& at, std::vector<T>& values) {
  if (!json.is_array()) fail_at(at, "must be a list");
  for (const Json& item : json) read(item, at + "[" + std::to_string(values.size()) + "]", values.emplace_back());
}

template <class T>
void read(const Json& json, const std::string& at, std::map<std::string, T>& values) {
  if (!json.is_object()) fail_at(at, "must be an object");
  for (const auto& [key, item] : json.items()) read(item, at + "." + key, values[key]);
}

struct FileSpec;
void read(const Json& json, const std::string& at, FileSpec& spec);  // manifest.cpp

/// The fields of one object. Call `required` or `optional` for each, then `finish`.
class Fields {
 public:
  Fields(const Json& json, std::string at) : json_(json), at_(std::move(at)) {
    if (!json.is_object()) fail_at(at_, "must be an object");
  }

  template <class T>
  Fields& required(const char* key, T& value) {
    if (!json_.contains(key)) fail_at(at_, std::string("has no \"") + key + '"');
    return optional(key, value);
  }

  template <class T>
  Fields& optional(const char* key, T& value) {
    known_.emplace_back(key);
    if (json_.contains(key)) read(json_.at(key), at_ + "." + key, value);
    return *this;
  }

  Fields& one_of(const char* key, std::string& value, std::initializer_list<const char*> choices) {
    required(key, value);
    if (std::ranges::find(choices, value) == choices.end()) fail_at(at_ + "." + key, "unknown value " + value);
    return *this;
  }

  void finish() const {
    for (const auto& [key, item] : json_.items()) {
      if (std::ranges::find(known_, key) == known_.end()) fail_at(at_, "unknown field \"" + key + '"');
    }
  }

 private:
  const Json& json_;
  std::string at_;
  std::vector<std::string> known_;
};

}  // namespace chameleon
