// What the rows of a batch take from the prefix cache, and what they give to it.
#pragma once

#include <set>

#include "decode/prefix_cache.h"
#include "decode/slots.h"
#include "engine/factor_table.h"

namespace chameleon {

struct Member;

/// Copies keys and values between the slots of a batch and the prefix cache. For the batch's thread.
///
/// What a prompt begins with is copied when its turn to be read comes: by then other rows have read what they share.
class Prefixes {
 public:
  /// cache, slots, table: must outlive this
  Prefixes(PrefixCache& cache, Slots& slots, const FactorTable& table, std::size_t prefill_tokens);

  /// Begin a member's row with what there is of its prompt. False if that is nothing.
  bool restore(const Member& member, std::size_t place);
  /// Note how many tokens of a member's prompt were found when it began, and how many of them are exact.
  void begin(const Member& member, std::size_t cached, std::size_t exact);
  /// Offer the keys and values of a member's row.
  void keep(const Member& member, std::size_t place);

  /// Equal for prompts that begin with equal keys and values.
  using Beginning = std::pair<std::string, std::vector<std::int64_t>>;
  [[nodiscard]] Beginning beginning(const Member& member) const;
  /// Whether a member's prompt begins with what is here, or with what one of these beginnings will be.
  [[nodiscard]] bool will_have(const Member& member, const std::set<Beginning>& beginnings) const;

 private:
  /// A root of a member's text, and which of its tokens are found after it.
  struct Part {
    std::shared_ptr<PrefixCache::Root> root;
    std::size_t first, end;
  };

  [[nodiscard]] std::vector<Part> parts(const Member& member) const;
  [[nodiscard]] std::vector<PrefixCache::Found> find(const Member& member, bool is_used) const;

  PrefixCache& cache_;
  Slots& slots_;
  const FactorTable& table_;
  std::size_t prefill_tokens_;
  // Tokens of a prompt that are read in any case. Where a step follows that reads the last one, the rest may all be
  // found. Elsewhere a chunk must be read, of two tokens at least, see `chunk_length`.
  std::size_t left_;
};

}  // namespace chameleon
