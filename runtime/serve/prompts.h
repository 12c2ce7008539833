#pragma once

#include <vector>

#include "bodies.h"
#include "service.h"

namespace chameleon::serve {

/// The token ids of every prompt. param: the field that holds them. Throws ApiError.
std::vector<TokenIds> encode(const Prompts& prompts, const char* param, const Served& served);

}  // namespace chameleon::serve
