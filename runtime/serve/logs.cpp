#include "logs.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <iomanip>
#include <iostream>
#include <random>
#include <sstream>
#include <syncstream>

namespace chameleon::serve {

namespace {

constexpr std::size_t kLongestId = 128;

/// As Python's logging writes it, such as "2026-01-31 12:00:00,123".
std::string time_of_day() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto milliseconds =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm local{};
  ::localtime_r(&seconds, &local);
  std::ostringstream text;
  text << std::put_time(&local, "%F %T,") << std::setw(3) << std::setfill('0') << milliseconds;
  return text.str();
}

bool is_id_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
         std::string_view("_.:-").find(c) != std::string_view::npos;
}

}  // namespace

void Log::write(const char* level, const std::string& message, const Json& fields) const {
  std::osyncstream line(std::cerr);
  if (as_json_) {
    Json record = {{"time", time_of_day()}, {"level", level}, {"message", message}};
    record.update(fields);
    line << to_text(record) << '\n';
    return;
  }
  std::string upper = level;
  std::ranges::transform(upper, upper.begin(), [](char c) { return static_cast<char>(c - 'a' + 'A'); });
  std::string one_line = message;  // a path is the caller's
  std::ranges::replace_if(one_line, [](char c) { return static_cast<unsigned char>(c) < ' '; }, '?');
  line << time_of_day() << ' ' << upper << ' ' << one_line;
  for (const char* name : {"seconds", "request_id", "body"}) {
    if (fields.contains(name)) line << ' ' << name << '=' << to_text(fields[name]);
  }
  line << '\n';
}

std::string request_id(const std::string& given) {
  if (!given.empty() && given.size() <= kLongestId && std::ranges::all_of(given, is_id_character)) return given;
  thread_local std::mt19937_64 random{std::random_device{}()};
  std::ostringstream digits;
  digits << std::hex << std::setfill('0') << std::setw(16) << random() << std::setw(16) << random();
  return digits.str();
}

}  // namespace chameleon::serve
