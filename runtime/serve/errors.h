// From an exception to an HTTP status and the body that OpenAI's clients expect.
#pragma once

#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>

namespace chameleon::serve {

using Json = nlohmann::ordered_json;

/// JSON as a response holds it. A byte that is not UTF-8 becomes U+FFFD.
std::string to_text(const Json& json);

/// A fault that has an answer: an HTTP status and what the error body says.
struct ApiError : std::runtime_error {
  /// param: the field of the request that is at fault, where one is
  ApiError(int status_, std::string code_, const std::string& message, std::optional<std::string> param_ = {})
      : std::runtime_error(message), status(status_), code(std::move(code_)), param(std::move(param_)) {}

  [[nodiscard]] Json body() const;

  int status;
  std::string code;
  std::optional<std::string> param;
};

/// The answer to any exception; one that nobody foresaw tells the caller nothing of its text.
ApiError api_error(const std::exception& error, std::optional<std::string> param = {});

}  // namespace chameleon::serve
