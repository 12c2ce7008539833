#pragma once

#include <variant>
#include <vector>

namespace chameleon {

/// One value for all prompts, or one for each.
template <class T>
using PerPrompt = std::variant<T, std::vector<T>>;

}  // namespace chameleon
