// Reading and checking the body of a request, with the messages of msgspec, which the Python server has.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "chameleon/manifest.h"
#include "chameleon/runtime.h"
#include "errors.h"

namespace chameleon::serve {

/// What a field may hold. The range of a number holds for every item of a list and every value of a map too.
struct Limits {
  double least = -std::numeric_limits<double>::infinity();
  double most = std::numeric_limits<double>::infinity();
  bool is_least_excluded = false;
  bool is_nullable = false;  ///< null is one of its values, and not only a word for leaving it out; messages say so
};

/// Prompts: texts, or lists of token ids.
using Prompts = std::variant<std::vector<std::string>, std::vector<TokenIds>>;

/// A vector for each text: a list of lists of numbers, all of one length.
struct Vectors {
  std::size_t rows = 0, columns = 0;
  std::vector<float> values;  ///< [rows, columns]

  /// Valid as long as this.
  [[nodiscard]] Matrix matrix() const { return {rows, columns, values}; }
};

/// The fields of a JSON object. null means that a field is left out, and unknown fields are ignored.
class Fields {
 public:
  /// The body of a request. Throws ApiError unless it is a JSON object.
  static Fields of_body(std::string_view raw);
  /// at: the place of the object in the body, such as "$.stream_options"
  Fields(Json object, std::string at) : object_(std::move(object)), at_(std::move(at)) {}

  /// Read a field into `value`. Throws ApiError for one that is missing, of another type or out of range.
  template <class T>
  const Fields& required(const char* name, T& value, const Limits& limits = {}) const {
    if (find(name) == nullptr) fail_missing(name);
    return optional(name, value, limits);
  }

  /// The same for a field that may be left out, which leaves `value` alone.
  template <class T>
  const Fields& optional(const char* name, T& value, const Limits& limits = {}) const {
    if (const Json* json = find(name)) read(*json, at_ + "." + name, value, limits);
    return *this;
  }

  /// The object in a field.
  [[nodiscard]] std::optional<Fields> object(const char* name) const;

 private:
  [[nodiscard]] const Json* find(const char* name) const;
  [[noreturn]] static void fail_missing(const char* name);

  Json object_;
  std::string at_;
};

/// expected: a type as msgspec calls it
/// at: the place in the body, such as "$.stop[1]"
[[noreturn]] void fail_expected(std::string expected, const Json& found, const std::string& at, const Limits& limits);

void read(const Json& json, const std::string& at, bool& value, const Limits& limits);
void read(const Json& json, const std::string& at, std::int64_t& value, const Limits& limits);
void read(const Json& json, const std::string& at, std::uint64_t& value, const Limits& limits);  // modulo 2**64
void read(const Json& json, const std::string& at, double& value, const Limits& limits);
void read(const Json& json, const std::string& at, std::string& value, const Limits& limits);
void read(const Json& json, const std::string& at, Mode& value, const Limits& limits);
void read(const Json& json, const std::string& at, Prompts& value, const Limits& limits);
void read(const Json& json, const std::string& at, std::map<std::int64_t, double>& values, const Limits& limits);
void read(const Json& json, const std::string& at, Vectors& vectors, const Limits& limits);

template <class T>
void read(const Json& json, const std::string& at, std::vector<T>& values, const Limits& limits) {
  if (!json.is_array()) fail_expected("array", json, at, limits);
  Limits of_item = limits;
  of_item.is_nullable = false;
  for (const Json& item : json) {
    T value{};
    read(item, at + "[" + std::to_string(values.size()) + "]", value, of_item);
    values.push_back(std::move(value));
  }
}

template <class T>
void read(const Json& json, const std::string& at, std::optional<T>& value, const Limits& limits) {
  Limits nullable = limits;
  nullable.is_nullable = true;
  read(json, at, value.emplace(), nullable);
}

}  // namespace chameleon::serve
