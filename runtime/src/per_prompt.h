// The value of each prompt, and how many there have to be.
#pragma once

#include <string>

#include "chameleon/error.h"
#include "chameleon/per_prompt.h"

namespace chameleon {

/// The value of the prompt of this number.
template <class T>
const T& value_of(const PerPrompt<T>& values, std::size_t prompt) {
  const auto* each = std::get_if<std::vector<T>>(&values);
  return each != nullptr ? each->at(prompt) : std::get<T>(values);
}

/// Throws InputError for another number of values than one or `batch`.
template <class T>
void check_count(const PerPrompt<T>& values, std::size_t batch, const char* name) {
  const auto* each = std::get_if<std::vector<T>>(&values);
  if (each != nullptr && each->size() != batch) {
    throw InputError(std::to_string(each->size()) + " values of " + name + " for " + std::to_string(batch) +
                     " prompts: pass one, or one per prompt");
  }
}

}  // namespace chameleon
