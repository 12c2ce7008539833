#include "bodies.h"

#include <algorithm>
#include <charconv>

namespace chameleon::serve {

namespace {

/// The field of a place: "stop" of "$.stop[1]".
std::optional<std::string> field_of(const std::string& at) {
  if (!at.starts_with("$.")) return std::nullopt;
  return at.substr(2, at.find_first_of(".[", 2) - 2);
}

[[noreturn]] void fail(const std::string& problem, const std::string& at) {
  const std::string where = at == "$" ? "" : " - at `" + at + "`";
  throw ApiError(400, "input_invalid", "the body is not valid: " + problem + where, field_of(at));
}

const char* type_of(const Json& json) {
  switch (json.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return "bool";
    case Json::value_t::string:
      return "str";
    case Json::value_t::array:
      return "array";
    case Json::value_t::object:
      return "object";
    case Json::value_t::number_float:
      return "float";
    default:
      return "int";
  }
}

/// type: as msgspec calls it; limits of a float are written with a decimal point
void check_range(double value, const char* type, const Limits& limits, const std::string& at) {
  const bool is_float = std::string_view(type) == "float";
  const auto expect = [&](const char* relation, double limit) {
    std::string number = std::to_string(static_cast<std::int64_t>(limit));
    fail("Expected `" + std::string(type) + "` " + relation + " " + number + (is_float ? ".0" : ""), at);
  };
  if (limits.is_least_excluded && !(value > limits.least)) expect(">", limits.least);
  if (!(value >= limits.least)) expect(">=", limits.least);
  if (!(value <= limits.most)) expect("<=", limits.most);
}

template <class Integer>
std::optional<Integer> to_integer(std::string_view text) {
  Integer value{};
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if (std::to_string(value) != text) return std::nullopt;  // "05"
  return value;
}

}  // namespace

void fail_expected(std::string expected, const Json& found, const std::string& at, const Limits& limits) {
  if (limits.is_nullable) expected += " | null";
  fail("Expected `" + expected + "`, got `" + type_of(found) + "`", at);
}

Fields Fields::of_body(std::string_view raw) {
  Json json;
  try {
    json = Json::parse(raw);
  } catch (const Json::exception& error) {
    fail("JSON is malformed: " + std::string(error.what()), "$");
  }
  if (!json.is_object()) fail_expected("object", json, "$", {});
  return {std::move(json), "$"};
}

std::optional<Fields> Fields::object(const char* name) const {
  const Json* json = find(name);
  if (json == nullptr) return std::nullopt;
  const std::string at = at_ + "." + name;
  if (!json->is_object()) fail_expected("object", *json, at, {.is_nullable = true});
  return Fields(*json, at);
}

const Json* Fields::find(const char* name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

void Fields::fail_missing(const char* name) {
  throw ApiError(400, "input_invalid",
                 "the body is not valid: Object missing required field `" + std::string(name) + "`", name);
}

void read(const Json& json, const std::string& at, bool& value, const Limits& limits) {
  if (!json.is_boolean()) fail_expected("bool", json, at, limits);
  value = json.get<bool>();
}

void read(const Json& json, const std::string& at, std::int64_t& value, const Limits& limits) {
  if (!json.is_number_integer()) fail_expected("int", json, at, limits);
  check_range(json.get<double>(), "int", limits, at);
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
    fail("Integer value out of range", at);
  }
  value = json.get<std::int64_t>();
}

void read(const Json& json, const std::string& at, std::uint64_t& value, const Limits& limits) {
  if (!json.is_number_integer()) fail_expected("int", json, at, limits);
  value = json.is_number_unsigned() ? json.get<std::uint64_t>() : static_cast<std::uint64_t>(json.get<std::int64_t>());
}

void read(const Json& json, const std::string& at, double& value, const Limits& limits) {
  if (!json.is_number()) fail_expected("float", json, at, limits);
  value = json.get<double>();
  check_range(value, "float", limits, at);
}

void read(const Json& json, const std::string& at, std::string& value, const Limits& limits) {
  if (!json.is_string()) fail_expected("str", json, at, limits);
  value = json.get<std::string>();
}

void read(const Json& json, const std::string& at, Mode& value, const Limits& limits) {
  std::string name;
  read(json, at, name, limits);
  try {
    value = parse_mode(name);
  } catch (const ModeError&) {
    fail("Invalid enum value '" + name + "'", at);
  }
}

/// A text, a list of texts, a list of token ids, or a list of such lists.
void read(const Json& json, const std::string& at, Prompts& value, const Limits& limits) {
  if (json.is_string()) {
    value = std::vector{json.get<std::string>()};
    return;
  }
  if (!json.is_array()) fail_expected("str | array", json, at, limits);
  for (std::size_t i = 0; i < json.size(); ++i) {
    const Json& item = json[i];
    if (!item.is_string() && !item.is_number_integer() && !item.is_array()) {
      fail_expected("int | str | array", item, at + "[" + std::to_string(i) + "]", limits);
    }
  }
  if (json.empty() || json.front().is_string()) {
    read(json, at, value.emplace<std::vector<std::string>>(), limits);
  } else if (json.front().is_array()) {
    read(json, at, value.emplace<std::vector<TokenIds>>(), limits);
  } else {
    read(json, at, value.emplace<std::vector<TokenIds>>().emplace_back(), limits);
  }
}

void read(const Json& json, const std::string& at, Vectors& vectors, const Limits& limits) {
  std::vector<std::vector<double>> rows;
  read(json, at, rows, limits);
  vectors.rows = rows.size();
  vectors.columns = rows.empty() ? 0 : rows.front().size();
  for (const std::vector<double>& row : rows) {
    if (row.size() != vectors.columns) {
      const std::string field = field_of(at).value();
      throw ApiError(400, "input_invalid", field + " is no array of numbers: its vectors have different lengths",
                     field);
    }
    for (const double value : row) vectors.values.push_back(static_cast<float>(value));
  }
}

void read(const Json& json, const std::string& at, std::map<std::int64_t, double>& values, const Limits& limits) {
  if (!json.is_object()) fail_expected("object", json, at, limits);
  for (const auto& [key, item] : json.items()) {
    const auto id = to_integer<std::int64_t>(key);
    if (!id) {
      throw ApiError(400, "input_invalid",
                     "the body is not valid: Expected `int`, got `str` - at `key` in `" + at + "`", field_of(at));
    }
    Limits of_value = limits;
    of_value.is_nullable = false;
    read(item, at + "[...]", values[*id], of_value);
  }
}

}  // namespace chameleon::serve
