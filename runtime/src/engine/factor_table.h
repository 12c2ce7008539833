// The factor sets of a batch, stacked for the decoder and counted by reference.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "factors.h"

namespace chameleon {

/// The key of a set of zeros, which a table has in any case.
inline const std::string kNoUpdate = "no update";

/// A stack of immutable factor sets. A set is made for its first row and removed with its last.
///
/// Sets of a smaller rank than the largest are padded with zeros, which add nothing to a row's logits.
class FactorTable {
 public:
  explicit FactorTable(std::size_t max_sets) : max_sets_(max_sets) {}
  /// The sets of rows that are known from the start, all made and kept. The key of a set is its place in the stack.
  explicit FactorTable(const FactorSets& made);

  [[nodiscard]] std::size_t size() const { return keys_.size(); }
  [[nodiscard]] bool is_full() const { return size() >= max_sets_; }
  [[nodiscard]] bool contains(const std::string& key) const { return entries_.contains(key); }
  /// The place of a set in the stack.
  [[nodiscard]] std::size_t index(const std::string& key) const { return entries_.at(key).place; }
  /// The stack. It is valid until a set is added or removed.
  [[nodiscard]] FactorSets sets() const { return made_ ? *made_ : some_sets(0, size()); }
  /// The single set of a key, likewise, in its own rank: the same values whatever else the table holds.
  [[nodiscard]] RowFactors set_of(const std::string& key) const;
  /// The SHA-256 of a set's values that reach the trunk: of none where only the head is updated.
  const std::string& trunk_digest(const std::string& key) const;

  /// Count one more row of a set, which is made first if it is not resident. `is_full` must be false then.
  /// Throws NumericError for a set that is not finite, and whatever making it throws.
  void acquire(const FactorSource& source);
  /// Count one row less.
  void release(const std::string& key);

 private:
  using Tensors = std::map<std::string, std::vector<float>>;  // [max_sets, rank, in_features or out_features]
  struct Entry {
    std::size_t place, references;
    bool updates_nothing;
    std::string trunk_digest{};  // empty until it is asked for
  };

  [[nodiscard]] FactorSets some_sets(std::size_t first, std::size_t count) const;
  void append(const std::string& key, const FactorSets& made);
  void remove(std::size_t i);
  void set_rank();

  std::size_t max_sets_;
  std::optional<FactorSets> made_{};
  std::vector<std::string> keys_;  // in the order of the stack
  std::vector<std::int64_t> ranks_;
  mutable std::map<std::string, Entry> entries_;
  mutable std::string no_update_digest_{};  // empty until it is asked for
  std::int64_t rank_ = 0;  // of the stack: the largest of its sets'; a larger one would waste computation
  std::shared_ptr<Tensors> tensors_ = std::make_shared<Tensors>();
};

}  // namespace chameleon
