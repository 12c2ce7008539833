#pragma once

#include <string_view>

namespace chameleon::serve {

/// The content of openapi.json.
extern const std::string_view kOpenApi;

}  // namespace chameleon::serve
