#include "errors.h"

#include <array>
#include <string_view>
#include <utility>

#include "chameleon/error.h"

namespace chameleon::serve {

namespace {

// What the caller can change. Every other chameleon::Error is a fault of this side.
int status_of(std::string_view code) {
  constexpr std::array<std::pair<std::string_view, int>, 9> known = {{{"input_invalid", 400},
                                                                      {"adapter_invalid", 400},
                                                                      {"tensor_invalid", 400},
                                                                      {"text_too_long", 400},
                                                                      {"mode_unavailable", 400},
                                                                      {"token_invalid", 422},
                                                                      {"queue_full", 429},
                                                                      {"closed", 503},
                                                                      {"bundle_changed", 503}}};
  for (const auto& [name, status] : known) {
    if (name == code) return status;
  }
  return 500;
}

const char* type_of(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return status >= 500 ? "server_error" : "invalid_request_error";
  }
}

}  // namespace

std::string to_text(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json ApiError::body() const {
  return {{"error",
           {{"message", what()}, {"type", type_of(status)}, {"param", param ? Json(*param) : Json()}, {"code", code}}}};
}

ApiError api_error(const std::exception& error, std::optional<std::string> param) {
  if (const auto* known = dynamic_cast<const ApiError*>(&error)) return *known;
  if (const auto* ours = dynamic_cast<const Error*>(&error)) {
    return {status_of(ours->code()), ours->code(), ours->what(), std::move(param)};
  }
  return {500, "internal_error", "the server failed on this request: see its log"};
}

}  // namespace chameleon::serve
