#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "chameleon/export.h"

namespace chameleon {

/// A row-major float32 matrix [rows, columns] in memory of the caller.
struct Matrix {
  std::size_t rows = 0;
  std::size_t columns = 0;
  std::span<const float> values;
  std::shared_ptr<const void> owner{};  ///< keeps the values alive, where the caller does not
};

/// A caller's factor set: a matrix for each factor tensor, such as "lm_head.lora_A" [rank, in_features] and
/// "lm_head.lora_B" [rank, out_features], with alpha multiplied into lora_B. Every target needs both, all of one rank,
/// which need not be the bundle's. The values are copied.
using Factors = std::map<std::string, Matrix>;

/// A stack of factor sets: each tensor is float32 [count, rank, in_features or out_features]. Immutable and shared, so
/// copies are cheap.
struct FactorSets {
  std::int64_t count = 0;
  std::int64_t rank = 0;
  std::map<std::string, std::span<const float>> tensors;  ///< by name, such as "lm_head.lora_A"
  std::shared_ptr<const void> owner;                      ///< keeps the tensors alive
  bool updates_nothing = false;  ///< whether the sets were made as zeros, so that a decoder need not multiply them
};

/// Factor sets, and which of them each row uses.
struct RowFactors {
  FactorSets sets;
  std::vector<std::int64_t> factor_ids;  ///< [batch]
  /// [batch], the token from which on a row's set updates it: those before it are the base model's. Empty is the first
  /// for all rows.
  std::vector<std::int64_t> starts{};

  /// The same sets for some of the rows.
  [[nodiscard]] CHAMELEON_EXPORT RowFactors rows(std::span<const std::size_t> indices) const;
};

}  // namespace chameleon
