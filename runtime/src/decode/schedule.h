// The decisions of the engine: which row is admitted next, how long a prefill chunk is, and which prompts share a call.
//
// Rows are divided evenly: the next is of the request that has the fewest in the batch, among equals the first to come.
// So a request of many rows takes all while nobody else waits, and others get theirs as its rows end. Factor sets that
// have no room cause a bounded number of exceptions.
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

/// A rule for how many prompt tokens are prefilled between two steps.
struct Schedule {
  std::size_t chunk_tokens;  ///< prompt tokens of one call of the decoder
  bool reads_all = false;    ///< every prompt that is not read yet, else one call
};

/// How many rows a request may have of the places that are free: half, so that it never takes all of them. A single row
/// may take the last.
inline std::size_t most_rows(std::size_t places) { return std::max(places / 2, std::min<std::size_t>(places, 1)); }

/// Remove and return the row that may be admitted next; null if there is none.
///
/// queue        pointers to rows with a key() and a counter `overtaken`, in order of arrival
/// running      how many rows of a row's request are in the batch
/// is_resident  whether a row's factor set is in the table
/// is_full      whether the table has no room for another
template <class Pointer, class Running, class IsResident>
Pointer take_next(std::vector<Pointer>& queue, const Running& running, const IsResident& is_resident, bool is_full) {
  std::vector<Pointer> in_turn = queue;
  std::ranges::stable_sort(in_turn, {}, [&](const Pointer& row) { return running(*row); });
  for (auto row = in_turn.begin(); row != in_turn.end(); ++row) {
    if (!is_full || is_resident(**row)) {
      std::for_each(in_turn.begin(), row, [](const Pointer& overtaken) { ++overtaken->overtaken; });
      std::erase(queue, *row);
      return *row;
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
