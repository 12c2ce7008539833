#include "engine/factor_table.h"

#include <algorithm>
#include <cmath>

#include "chameleon/error.h"

namespace chameleon {

std::size_t FactorTable::index(const std::string& key) const {
  return static_cast<std::size_t>(std::ranges::find(keys_, key) - keys_.begin());
}

void FactorTable::acquire(const FactorSource& source) {
  if (!contains(source.key)) append(source.key, source.make());
  ++references_[source.key];
}

void FactorTable::release(const std::string& key) {
  const auto references = references_.find(key);
  if (--references->second > 0) return;
  const std::size_t i = index(key);
  references_.erase(references);
  remove(i);
}

FactorSets FactorTable::some_sets(std::size_t first, std::size_t count) const {
  FactorSets sets{static_cast<std::int64_t>(count), rank_, {}, tensors_};
  for (const auto& [name, values] : *tensors_) {
    const std::size_t size = values.size() / max_sets_;
    sets.tensors[name] = std::span(values).subspan(first * size, count * size);
  }
  return sets;
}

void FactorTable::append(const std::string& key, const FactorSets& made) {
  for (const auto& [name, values] : made.tensors) {
    // A set that is not finite would spread to every row: 0 * inf is NaN in the product over all sets.
    if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
      throw NumericError("the factors of a request are not finite: check the hypernetwork");
    }
  }
  if (tensors_->empty()) {
    rank_ = made.rank;
    for (const auto& [name, values] : made.tensors) (*tensors_)[name].resize(max_sets_ * values.size());
  }
  keys_.push_back(key);
  ranks_.push_back(made.rank);
  set_rank();
  for (const auto& [name, values] : made.tensors) {
    std::vector<float>& stack = tensors_->at(name);
    const std::size_t size = stack.size() / max_sets_;
    const auto set = std::span(stack).subspan((keys_.size() - 1) * size, size);
    std::ranges::fill(std::ranges::copy(values, set.begin()).out, set.end(), 0.0F);
  }
}

/// Remove set i; the last set moves into its place.
void FactorTable::remove(std::size_t i) {
  for (auto& [name, stack] : *tensors_) {
    const std::size_t size = stack.size() / max_sets_;
    const auto set = [&](std::size_t place) { return stack.begin() + static_cast<std::ptrdiff_t>(place * size); };
    if (i + 1 < keys_.size()) std::copy_n(set(keys_.size() - 1), size, set(i));
  }
  std::swap(keys_[i], keys_.back());
  std::swap(ranks_[i], ranks_.back());
  keys_.pop_back();
  ranks_.pop_back();
  if (!keys_.empty()) set_rank();
}

void FactorTable::set_rank() {
  const std::int64_t rank = std::ranges::max(ranks_);
  if (rank == rank_) return;
  auto resized = std::make_shared<Tensors>();
  for (const auto& [name, stack] : *tensors_) {
    const std::size_t old_size = stack.size() / max_sets_, width = old_size / static_cast<std::size_t>(rank_);
    const std::size_t size = static_cast<std::size_t>(rank) * width;
    std::vector<float>& values = (*resized)[name];
    values.resize(max_sets_ * size);
    for (std::size_t set = 0; set < keys_.size(); ++set) {
      std::ranges::copy(std::span(stack).subspan(set * old_size, std::min(size, old_size)),
                        values.begin() + static_cast<std::ptrdiff_t>(set * size));
    }
  }
  tensors_ = std::move(resized);
  rank_ = rank;
}

}  // namespace chameleon
