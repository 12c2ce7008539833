#include "prompts.h"

namespace chameleon::serve {

std::vector<TokenIds> encode(const Prompts& prompts, const char* param, const Served& served) {
  const std::size_t count = std::visit([](const auto& items) { return items.size(); }, prompts);
  if (count > served.max_prompts) {
    throw ApiError(400, "input_invalid",
                   std::to_string(count) + " prompts, at most " + std::to_string(served.max_prompts) + " are taken",
                   param);
  }
  try {
    return std::visit([&](const auto& items) { return served.runtime.encode(std::span(items)); }, prompts);
  } catch (const Error& error) {
    throw api_error(error, param);
  }
}

}  // namespace chameleon::serve
