#pragma once

#include <optional>
#include <string>
#include <vector>

#include "chameleon/sampling.h"
#include "job.h"

namespace chameleon::serve {

/// A prompt as its response repeats it: choices of its tokens where log-probabilities are asked for.
struct Echo {
  std::string text;
  std::vector<Choice> choices;
};

/// What comes before the new text of every prompt; empty where it is not asked for. Throws an Error.
/// tenant: of the API key
std::vector<Echo> echoes(const Job& job, const std::optional<std::string>& tenant);

}  // namespace chameleon::serve
