#include "contract/basis.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

#include "chameleon/error.h"
#include "contract/rotation.h"
#include "contract/safetensors.h"
#include "factors.h"

namespace chameleon {

namespace {

/// The sizes of a rotation's blocks, one for each of equal parts of the channels. Throws TensorError.
std::vector<std::int64_t> blocks_of(const SafeTensor& tensor, std::int64_t channels, const std::string& what) {
  constexpr std::array<std::int64_t, 4> sizes = {1, 4, 16, 64};
  const std::size_t count = tensor.shape.size() == 1 ? static_cast<std::size_t>(tensor.shape[0]) : 0;
  if (tensor.dtype != "I64" || count < 1 || channels % static_cast<std::int64_t>(count) != 0) {
    throw TensorError(what + " is no list of the block sizes 1, 4, 16 and 64 for equal parts of the channels");
  }
  std::vector<std::int64_t> blocks(count);
  std::memcpy(blocks.data(), tensor.bytes.data(), tensor.bytes.size());
  for (const std::int64_t block : blocks) {
    if (std::ranges::find(sizes, block) == sizes.end() || channels / static_cast<std::int64_t>(count) % block != 0) {
      throw TensorError(what + " has a block that is not 1, 4, 16 or 64, or does not divide the channels");
    }
  }
  return blocks;
}

/// Rotate and scale each row of a stack of matrices.
std::vector<float> convert(std::span<const float> matrices, std::span<const float> before,
                           std::span<const std::int64_t> blocks, std::span<const float> after) {
  std::vector<float> converted(matrices.begin(), matrices.end());
  const std::size_t width = after.size(), part = width / blocks.size();
  for (std::size_t start = 0; start < converted.size(); start += width) {
    const std::span<float> row = std::span(converted).subspan(start, width);
    if (!before.empty()) std::ranges::transform(row, before, row.begin(), std::multiplies<>());
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      rotate(row.subspan(i * part, part), static_cast<std::size_t>(blocks[i]));
    }
    std::ranges::transform(row, after, row.begin(), std::multiplies<>());
  }
  return converted;
}

}  // namespace

std::map<std::string, TargetBasis> read_basis(std::string_view content, const std::string& where,
                                              const AdaptationSpec& spec) {
  const SafeTensors file = parse_safetensors(content, where);
  std::map<std::string, TargetBasis> basis;
  for (const TargetSpec& target : spec.targets) {
    if (target.name == kHead) continue;
    const auto what = [&](const char* name) { return where + ": " + target.name + "." + name; };
    const auto tensor = [&](const char* name) {
      const auto found = file.tensors.find(target.name + "." + name);
      if (found == file.tensors.end()) throw TensorError(what(name) + " is missing");
      return found->second;
    };
    const auto floats = [&](const char* name, std::int64_t size) {
      return tensor(name).floats(std::span(&size, 1), what(name));
    };
    basis[target.name] = {floats("in_before", target.in_features),
                          blocks_of(tensor("in_block"), target.in_features, what("in_block")).front(),
                          floats("in_after", target.in_features),
                          blocks_of(tensor("out_blocks"), target.out_features, what("out_blocks")),
                          floats("out_after", target.out_features)};
  }
  if (file.tensors.size() != 5 * basis.size()) throw TensorError(where + ": its tensors are not those of the targets");
  return basis;
}

FactorSets enter_basis(const FactorSets& sets, const std::map<std::string, TargetBasis>& basis) {
  if (basis.empty()) return sets;
  std::map<std::string, std::vector<float>> tensors;
  for (const auto& [name, values] : sets.tensors) tensors[name].assign(values.begin(), values.end());
  for (const auto& [target, of_target] : basis) {
    std::vector<float>&A = tensors.at(target + ".lora_A"), &B = tensors.at(target + ".lora_B");
    A = convert(A, of_target.in_before, std::span(&of_target.in_block, 1), of_target.in_after);
    B = convert(B, {}, of_target.out_blocks, of_target.out_after);
  }
  return make_factor_sets(sets.count, sets.rank, std::move(tensors));
}

}  // namespace chameleon
