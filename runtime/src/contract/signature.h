// The inputs and outputs that a graph of each role has for a model.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "chameleon/manifest.h"

namespace chameleon {

/// Check that the inputs and outputs that the manifest lists for a graph are those of its role for this model: every
/// name, dtype and dimension. `where` is named in messages. Throws ManifestError.
void check_graph(const GraphSpec& graph, const Manifest& manifest, const std::string& where);

/// The first difference of two lists of tensors in any order, or nothing if they are equal.
std::optional<std::string> difference(const std::vector<TensorSpec>& expected, const std::vector<TensorSpec>& actual);

}  // namespace chameleon
