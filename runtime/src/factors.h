// Making, checking and selecting factor sets.
#pragma once

#include <functional>

#include "chameleon/factors.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// Whether a factor tensor is the head's: in shared-cache decoders those of the trunk have two axes.
inline bool in_head(const std::string& factor) { return factor == "lm_head.lora_A" || factor == "lm_head.lora_B"; }

/// The shape of a caller's matrix in messages.
std::string shape_text(std::size_t rows, std::size_t columns);

/// Factor sets that own their values.
FactorSets make_factor_sets(std::int64_t count, std::int64_t rank, std::map<std::string, std::vector<float>> tensors);

/// Sets in memory of their own.
FactorSets copied(const FactorSets& sets);

/// One set of rank 1 that changes nothing.
FactorSets no_factors(const AdaptationSpec& spec);

/// The same for the layers of other sets.
FactorSets zero_set(const FactorSets& sets);

/// A caller's factors as a stack of one set. Throws FactorsError.
FactorSets check_factors(const Factors& factors, const AdaptationSpec& spec);

/// The rank of one set without the zeros that pad it, at least 1.
std::int64_t rank_of(const FactorSets& set);

/// One set, and the weight of its update.
struct WeightedSet {
  FactorSets set;
  float weight;
};

/// The weighted sum of updates as one set: their ranks side by side, the weights multiplied into B. At least one part.
/// Throws NumericError for factors that a weight makes infinite, which would spread to every row of a call.
FactorSets blend_sets(std::span<const WeightedSet> parts);

/// All sets of some stacks as one stack; smaller ranks are padded with zeros.
FactorSets stack_sets(std::span<const FactorSets> stacks);

/// The sets that `set_ids` name, each once and in ascending order.
FactorSets pick(const FactorSets& all, std::span<const std::int64_t> set_ids);

/// The source of a row's factor set. Nothing is generated before it is made.
struct FactorSource {
  std::string key;                      ///< equal for rows that share a set
  std::function<FactorSets()> make;     ///< a stack of that set only
  std::vector<std::string> adapters{};  ///< the names that were chosen, in mode static with adapters
};

}  // namespace chameleon
