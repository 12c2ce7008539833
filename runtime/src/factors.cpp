#include "factors.h"

#include <algorithm>
#include <cmath>

#include "chameleon/error.h"

namespace chameleon {

namespace {

using Tensors = std::map<std::string, std::vector<float>>;

/// A copy of one matrix. Throws FactorsError.
std::vector<float> read_matrix(const std::string& name, const Matrix& matrix, std::size_t columns) {
  if (matrix.rows < 1 || matrix.columns != columns) {
    throw FactorsError(name + " has shape " + shape_text(matrix.rows, matrix.columns) + ", expected (rank, " +
                       std::to_string(columns) + ")");
  }
  if (matrix.values.size() / columns != matrix.rows || matrix.values.size() % columns != 0) {
    throw FactorsError(name + " has " + std::to_string(matrix.values.size()) + " values for shape " +
                       shape_text(matrix.rows, columns));
  }
  if (!std::ranges::all_of(matrix.values, [](float value) { return std::isfinite(value); })) {
    throw FactorsError(name + " holds NaN or infinity");
  }
  return {matrix.values.begin(), matrix.values.end()};
}

/// Whole sets of one tensor.
std::vector<float> copy_sets(std::span<const float> tensor, std::size_t size, std::span<const std::int64_t> ids) {
  std::vector<float> chosen;
  chosen.reserve(ids.size() * size);
  for (const std::int64_t id : ids) {
    const auto set = tensor.subspan(static_cast<std::size_t>(id) * size, size);
    chosen.insert(chosen.end(), set.begin(), set.end());
  }
  return chosen;
}

FactorSets make_zeros(Tensors tensors) {
  FactorSets zeros = make_factor_sets(1, 1, std::move(tensors));
  zeros.updates_nothing = true;
  return zeros;
}

}  // namespace

std::string shape_text(std::size_t rows, std::size_t columns) {
  return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

RowFactors RowFactors::rows(std::span<const std::size_t> indices) const {
  RowFactors selected{sets, {}};
  selected.factor_ids.reserve(indices.size());
  for (const std::size_t row : indices) selected.factor_ids.push_back(factor_ids[row]);
  if (starts.empty()) return selected;
  for (const std::size_t row : indices) selected.starts.push_back(starts[row]);
  return selected;
}

FactorSets make_factor_sets(std::int64_t count, std::int64_t rank, Tensors tensors) {
  const auto owner = std::make_shared<const Tensors>(std::move(tensors));
  return {count, rank, {owner->begin(), owner->end()}, owner};
}

FactorSets copied(const FactorSets& sets) {
  Tensors tensors;
  for (const auto& [name, values] : sets.tensors) tensors[name].assign(values.begin(), values.end());
  FactorSets copy = make_factor_sets(sets.count, sets.rank, std::move(tensors));
  copy.updates_nothing = sets.updates_nothing;
  return copy;
}

FactorSets no_factors(const AdaptationSpec& spec) {
  Tensors tensors;
  for (const auto& [name, width] : spec.factor_widths()) tensors[name].resize(static_cast<std::size_t>(width));
  return make_zeros(std::move(tensors));
}

FactorSets zero_set(const FactorSets& sets) {
  Tensors tensors;
  for (const auto& [name, values] : sets.tensors) {
    tensors[name].resize(values.size() / static_cast<std::size_t>(sets.count * sets.rank));
  }
  return make_zeros(std::move(tensors));
}

FactorSets check_factors(const Factors& factors, const AdaptationSpec& spec) {
  const auto widths = spec.factor_widths();
  for (const auto& [name, matrix] : factors) {
    if (!widths.contains(name)) throw FactorsError("'" + name + "' is not a factor tensor of this bundle");
  }
  Tensors tensors;
  for (const auto& [name, width] : widths) {
    const auto found = factors.find(name);
    if (found == factors.end()) throw FactorsError("factors have no '" + name + "'");
    const Matrix& matrix = found->second;
    tensors[name] = read_matrix(name, matrix, static_cast<std::size_t>(width));
    if (const std::size_t rank = factors.begin()->second.rows; matrix.rows != rank) {
      throw FactorsError(factors.begin()->first + " has rank " + std::to_string(rank) + ", " + name + " has rank " +
                         std::to_string(matrix.rows));
    }
  }
  return make_factor_sets(1, static_cast<std::int64_t>(factors.begin()->second.rows), std::move(tensors));
}

std::int64_t rank_of(const FactorSets& set) {
  std::int64_t rank = set.rank;
  const auto is_padding = [&](const auto& tensor) {
    const std::size_t width = tensor.second.size() / static_cast<std::size_t>(set.rank);
    const auto last = tensor.second.subspan(static_cast<std::size_t>(rank - 1) * width, width);
    return std::ranges::all_of(last, [](float value) { return value == 0; });
  };
  while (rank > 1 && std::ranges::all_of(set.tensors, is_padding)) --rank;
  return rank;
}

FactorSets blend_sets(std::span<const WeightedSet> parts) {
  if (parts.size() == 1 && parts.front().weight == 1) return parts.front().set;
  Tensors tensors;
  std::int64_t rank = 0;
  for (const auto& [set, weight] : parts) {
    const std::int64_t own = rank_of(set);
    rank += own;
    for (const auto& [name, values] : set.tensors) {
      const float factor = name.ends_with(".lora_B") ? weight : 1;
      std::vector<float>& blended = tensors[name];
      for (const float value :
           values.first(values.size() / static_cast<std::size_t>(set.rank) * static_cast<std::size_t>(own))) {
        blended.push_back(value * factor);
        if (!std::isfinite(blended.back())) {
          throw NumericError("the weights of adapters make infinite factors: choose smaller ones");
        }
      }
    }
  }
  return make_factor_sets(1, rank, std::move(tensors));
}

FactorSets stack_sets(std::span<const FactorSets> stacks) {
  if (stacks.size() == 1) return stacks.front();
  std::int64_t count = 0, rank = 0;
  for (const FactorSets& stack : stacks) {
    count += stack.count;
    rank = std::max(rank, stack.rank);
  }
  Tensors tensors;
  for (const FactorSets& stack : stacks) {
    for (const auto& [name, values] : stack.tensors) {
      std::vector<float>& stacked = tensors[name];
      const std::size_t size = values.size() / static_cast<std::size_t>(stack.count);
      const std::size_t padded = size / static_cast<std::size_t>(stack.rank) * static_cast<std::size_t>(rank);
      for (std::size_t start = 0; start < values.size(); start += size) {
        const auto set = values.subspan(start, size);
        stacked.insert(stacked.end(), set.begin(), set.end());
        stacked.resize(stacked.size() + padded - size);
      }
    }
  }
  FactorSets stacked = make_factor_sets(count, rank, std::move(tensors));
  stacked.updates_nothing = std::ranges::all_of(stacks, [](const FactorSets& stack) { return stack.updates_nothing; });
  return stacked;
}

FactorSets pick(const FactorSets& all, std::span<const std::int64_t> set_ids) {
  if (std::ssize(set_ids) == all.count) return all;
  Tensors tensors;
  for (const auto& [name, values] : all.tensors) {
    tensors[name] = copy_sets(values, values.size() / static_cast<std::size_t>(all.count), set_ids);
  }
  return make_factor_sets(std::ssize(set_ids), all.rank, std::move(tensors));
}

}  // namespace chameleon
