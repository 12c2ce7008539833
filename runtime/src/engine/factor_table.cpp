#include "engine/factor_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "chameleon/error.h"
#include "contract/mapped_file.h"

namespace chameleon {

FactorTable::FactorTable(const FactorSets& made) : max_sets_(static_cast<std::size_t>(made.count)), made_(made) {
  for (std::size_t place = 0; place < max_sets_; ++place) {
    keys_.push_back(std::to_string(place));
    entries_[keys_.back()] = {place, 1, made.updates_nothing};  // of this table, so that none is removed
  }
}

RowFactors FactorTable::set_of(const std::string& key) const {
  if (key == kNoUpdate) return {zero_set(sets()), {0}};
  const std::size_t place = index(key);
  // A set among others costs the decoder next to nothing.
  if (made_) return {*made_, {static_cast<std::int64_t>(place)}};
  FactorSets set{1, ranks_[place], {}, tensors_, entries_.at(key).updates_nothing};
  for (const auto& [name, values] : *tensors_) {
    const std::size_t size = values.size() / max_sets_;
    const std::size_t width = size / static_cast<std::size_t>(rank_);
    set.tensors[name] = std::span(values).subspan(place * size, static_cast<std::size_t>(set.rank) * width);
  }
  return {std::move(set), {0}};
}

const std::string& FactorTable::trunk_digest(const std::string& key) const {
  std::string& digest = key == kNoUpdate ? no_update_digest_ : entries_.at(key).trunk_digest;
  if (digest.empty()) {
    const FactorSets set = set_of(key).sets;
    std::string digests = std::to_string(set.rank);
    bool reaches_trunk = false;
    for (const auto& [name, values] : set.tensors) {
      if (in_head(name)) continue;
      reaches_trunk = true;
      digests += ' ' + sha256(std::as_bytes(values));
    }
    if (!reaches_trunk) digests.clear();
    digest = sha256(std::as_bytes(std::span(digests)));
  }
  return digest;
}

void FactorTable::acquire(const FactorSource& source) {
  if (!contains(source.key)) append(source.key, source.make());
  ++entries_.at(source.key).references;
}

void FactorTable::release(const std::string& key) {
  Entry& entry = entries_.at(key);
  if (--entry.references > 0) return;
  const std::size_t place = entry.place;
  entries_.erase(key);
  remove(place);
}

FactorSets FactorTable::some_sets(std::size_t first, std::size_t count) const {
  const bool updates_nothing =
      std::ranges::all_of(entries_, [](const auto& entry) { return entry.second.updates_nothing; });
  FactorSets sets{static_cast<std::int64_t>(count), rank_, {}, tensors_, updates_nothing};
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
  entries_[key] = {keys_.size(), 0, made.updates_nothing};
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
  if (i + 1 < keys_.size()) entries_.at(keys_.back()).place = i;
  std::swap(keys_[i], keys_.back());
  std::swap(ranks_[i], ranks_.back());
  keys_.pop_back();
  ranks_.pop_back();
  if (!keys_.empty()) set_rank();
}

/// Only a rank larger than any before takes new memory: a decoder's calls keep the stack that they were bound to.
void FactorTable::set_rank() {
  const std::int64_t rank = std::ranges::max(ranks_);
  if (rank == rank_) return;
  for (auto& [name, stack] : *tensors_) {
    const std::size_t old_size = stack.size() / max_sets_, width = old_size / static_cast<std::size_t>(rank_);
    const std::size_t size = static_cast<std::size_t>(rank) * width;
    stack.resize(max_sets_ * std::max(size, old_size));
    const auto move = [&, data = stack.data()](std::size_t set) {
      std::memmove(data + set * size, data + set * old_size, std::min(size, old_size) * sizeof(float));
      if (size > old_size) std::fill_n(data + set * size + old_size, size - old_size, 0.0F);
    };
    // Sets that grow move up, the last one first, so that none is written over before it has moved.
    for (std::size_t n = 0; n < keys_.size(); ++n) move(size > old_size ? keys_.size() - 1 - n : n);
    stack.resize(max_sets_ * size);
  }
  rank_ = rank;
}

}  // namespace chameleon
