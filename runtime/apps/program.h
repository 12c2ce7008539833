// What the programs share: options on the command line, and errors as one line with exit code 2.
#pragma once

#include <algorithm>
#include <charconv>
#include <exception>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "chameleon/error.h"

class UsageError : public chameleon::Error {
 public:
  explicit UsageError(const std::string& message) : Error("usage", message + " (--help lists the options)") {}
};

/// The value of an option. Throws UsageError for anything but a number of type T that is at least `lowest`.
template <class T>
T number(const std::string& option, const std::string& text, T lowest = std::numeric_limits<T>::lowest()) {
  T value{};
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || end != text.data() + text.size() || !(value >= lowest)) {
    throw UsageError("invalid value for " + option + ": '" + text + "'");
  }
  return value;
}

/// What to do with the argument of each option: it is called with the option's name and the argument.
using Options = std::map<std::string, std::function<void(const std::string&, const std::string&)>>;
/// The options without an argument, and what each sets to true.
using Flags = std::map<std::string, std::reference_wrapper<bool>>;

/// Read `--option VALUE`, `--option=VALUE`, flags and one other argument, BUNDLE, which is returned. Throws UsageError.
inline std::string parse_words(const std::vector<std::string>& words, const Options& options, const Flags& flags) {
  std::string bundle;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::size_t equals = words[i].starts_with("--") ? words[i].find('=') : std::string::npos;
    const std::string option = words[i].substr(0, equals);
    if (const auto flag = flags.find(words[i]); flag != flags.end()) {
      flag->second.get() = true;
    } else if (const auto found = options.find(option); found != options.end()) {
      if (equals == std::string::npos && i + 1 == words.size()) throw UsageError(option + " requires an argument");
      found->second(option, equals == std::string::npos ? words[++i] : words[i].substr(equals + 1));
    } else if (option.starts_with("--") || !bundle.empty()) {
      throw UsageError("no such option or too many arguments: " + words[i]);
    } else {
      bundle = words[i];
    }
  }
  if (bundle.empty()) throw UsageError("missing argument BUNDLE");
  return bundle;
}

/// Run a program's body. An exception becomes one line on standard error and exit code 2.
template <class Body>
int run_program(const Body& body) {
  const auto fail = [](std::string message, const char* code) {
    std::ranges::replace(message, '\n', ' ');
    std::cerr << "error: " << message << " [" << code << "]" << std::endl;
    return 2;
  };
  try {
    body();
    return 0;
  } catch (const chameleon::Error& error) {
    return fail(error.what(), error.code());
  } catch (const std::bad_alloc&) {
    return fail("out of memory: pass fewer or shorter texts", "error");
  } catch (const std::exception& error) {
    return fail(error.what(), "error");
  }
}
