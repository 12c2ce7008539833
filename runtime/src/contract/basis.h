// Bring factors into the basis of a bundle's linear layers: int8 graphs rotate and scale what layers read and write.
//
//     A' = ((A * in_before) H) * in_after        B' = (B H) * out_after
//
// H is block diagonal with Hadamard matrices (rotation.h); a block of 1 rotates nothing.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "chameleon/bundle.h"

namespace chameleon {

/// The content of basis.safetensors: the basis of every target but lm_head. Throws TensorError; `where` is named in
/// messages.
std::map<std::string, TargetBasis> read_basis(std::string_view content, const std::string& where,
                                              const AdaptationSpec& spec);

/// Factors of plain layers as factors of a bundle's layers; of one set or of several.
FactorSets enter_basis(const FactorSets& sets, const std::map<std::string, TargetBasis>& basis);

}  // namespace chameleon
