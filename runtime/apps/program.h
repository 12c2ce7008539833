// What the programs share: numbers on the command line, and errors as one line with exit code 2.
#pragma once

#include <algorithm>
#include <charconv>
#include <exception>
#include <iostream>
#include <limits>
#include <new>
#include <string>

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
