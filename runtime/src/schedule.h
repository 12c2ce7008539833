// The decisions of the engine: which row is admitted next, how long a prefill chunk is, and which prompts share a call.
//
// Admission is first come, first served, with a bounded number of exceptions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace chameleon {

/// How often rows with a resident factor set may overtake a row whose set has no room.
inline constexpr int kMaxOvertakes = 16;
/// A call of the decoder takes as long as so many tokens more: it reads all weights.
inline constexpr std::size_t kCallTokens = 32;

/// Remove and return the row that may be admitted next; null if there is none.
///
/// queue        pointers to rows with a key() and a counter `overtaken`, in order of arrival
/// is_resident  whether a row's factor set is in the table
/// is_full      whether the table has no room for another
template <class Pointer, class IsResident>
Pointer take_next(std::vector<Pointer>& queue, const IsResident& is_resident, bool is_full) {
  for (auto row = queue.begin(); row != queue.end(); ++row) {
    if (!is_full || is_resident(**row)) {
      std::for_each(queue.begin(), row, [](const Pointer& overtaken) { ++overtaken->overtaken; });
      Pointer taken = std::move(*row);
      queue.erase(row);
      return taken;
    }
    if ((*row)->overtaken >= kMaxOvertakes) return nullptr;
  }
  return nullptr;
}

/// How many tokens of a prompt to prefill next, at most chunk_tokens. A single token is never left for the last chunk:
/// the decoder would run it as a step, which rounds differently in int8.
inline std::size_t chunk_length(std::size_t remaining, std::size_t chunk_tokens) {
  return remaining == chunk_tokens + 1 ? chunk_tokens - 1 : std::min(remaining, chunk_tokens);
}

/// How many of the first prompts to prefill in one call, at least 1 if there is one.
///
/// They are padded to the longest one: to chunk_tokens at most, and by no more than the calls that are saved are worth.
///
/// lengths: tokens of whole prompts; a single token is prefilled alone, as the decoder would run it as a step
inline std::size_t joined(std::span<const std::size_t> lengths, std::size_t chunk_tokens) {
  std::size_t longest = 0, tokens = 0;
  for (std::size_t count = 0; count < lengths.size(); ++count) {
    longest = std::max(longest, lengths[count]);
    tokens += lengths[count];
    const std::size_t padded = (count + 1) * longest;
    if (count > 0 &&
        (std::min(lengths[count], lengths[0]) < 2 || padded > chunk_tokens || padded - tokens > count * kCallTokens)) {
      return count;
    }
  }
  return lengths.size();
}

}  // namespace chameleon
