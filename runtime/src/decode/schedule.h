// The decisions of the engine: which row is admitted next, how long a prefill chunk is, and which prompts share a call.
//
// Rows are divided evenly: the next is of the request that has the fewest in the batch, among equals the first to come.
// So a request of many rows takes all while nobody else waits, and others get theirs as its rows end. Several tenants
// share the rows as engine/tenants.h says, and each divides its own in this way. Factor sets that have no room cause a
// bounded number of exceptions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace chameleon {

/// How often rows with a resident factor set may overtake a row whose set has no room.
inline constexpr int kMaxOvertakes = 16;
/// A call of the decoder takes as long as so many tokens more: it reads all weights.
inline constexpr std::size_t kCallTokens = 32;
inline constexpr std::size_t kMinPrefillTokens = 8;

/// A rule for how many prompt tokens are prefilled between two steps.
struct Schedule {
  std::size_t prefill_tokens;  ///< prompt tokens of one call of the decoder
  bool reads_all = false;      ///< every prompt that is not read yet, else one call
};

/// How many rows a request may have of the places that are free: half, so that it never takes all of them. A single row
/// may take the last.
inline std::size_t most_rows(std::size_t places) { return std::max(places / 2, std::min<std::size_t>(places, 1)); }

/// The rows that may be admitted, in turn. Each is admitted before the next is asked for.
///
/// Pointer: to a row with a key(), its `stream`, its `tenant`, and a counter `overtaken`
template <class Pointer>
class Admissible {
 public:
  /// queue    in order of arrival
  /// running  how many rows of each stream are in the batch
  template <class Stream>
  Admissible(const std::vector<Pointer>& queue, std::map<Stream, std::size_t> running) {
    // A row's turn comes when its request has so many rows in the batch.
    std::vector<std::pair<std::size_t, Pointer>> in_turn;
    for (const Pointer& row : queue) in_turn.emplace_back(running[row->stream.get()]++, row);
    std::ranges::stable_sort(in_turn, {}, [](const auto& row) { return row.first; });
    for (auto& [turn, row] : in_turn) {
      const auto line = std::ranges::find_if(
          lines_, [&row](const auto& own) { return own.front()->tenant.name == row->tenant.name; });
      (line != lines_.end() ? *line : lines_.emplace_back()).push_back(std::move(row));
    }
  }

  /// The next row; null if there is none.
  ///
  /// is_resident  whether a row's factor set is in the table
  /// is_full      whether the table has no room for another
  /// next_line    which of the tenants' lines is next; nothing ends it
  template <class IsResident, class NextLine>
  Pointer next(const IsResident& is_resident, bool is_full, const NextLine& next_line) {
    while (overtakes_left_ > 0) {
      const std::optional<std::size_t> line = next_line(lines_);
      if (!line) break;
      const Pointer row = lines_[*line].front();
      lines_[*line].pop_front();
      if (lines_[*line].empty()) lines_.erase(lines_.begin() + static_cast<std::ptrdiff_t>(*line));
      if (is_full && !is_resident(*row)) {
        passed_.push_back(row);
        overtakes_left_ = std::min(overtakes_left_, kMaxOvertakes - row->overtaken);
        continue;
      }
      for (const Pointer& overtaken : passed_) ++overtaken->overtaken;
      if (!passed_.empty()) --overtakes_left_;
      return row;
    }
    return nullptr;
  }

 private:
  std::vector<std::deque<Pointer>> lines_;  // of each tenant, none empty
  std::vector<Pointer> passed_;
  int overtakes_left_ = kMaxOvertakes;
};

/// The most tokens of a chunk while another tenant, which has fewer rows, waits for its prompt to be read.
inline std::size_t short_chunk(std::size_t prefill_tokens) { return std::max(prefill_tokens / 4, kMinPrefillTokens); }

/// How many tokens of a prompt to prefill next, at most prefill_tokens. A single token is never left for the last
/// chunk: the decoder would run it as a step, which rounds differently in int8.
inline std::size_t chunk_length(std::size_t remaining, std::size_t prefill_tokens) {
  return remaining == prefill_tokens + 1 ? prefill_tokens - 1 : std::min(remaining, prefill_tokens);
}

/// How many of the first prompts to prefill in one call, at least 1 if there is one.
///
/// They are padded to the longest one: to prefill_tokens at most, and by no more than the calls that are saved are
/// worth.
///
/// lengths: tokens of whole prompts; a single token is prefilled alone, as the decoder would run it as a step
inline std::size_t joined(std::span<const std::size_t> lengths, std::size_t prefill_tokens) {
  std::size_t longest = 0, tokens = 0;
  for (std::size_t count = 0; count < lengths.size(); ++count) {
    longest = std::max(longest, lengths[count]);
    tokens += lengths[count];
    const std::size_t padded = (count + 1) * longest;
    if (count > 0 && (std::min(lengths[count], lengths[0]) < 2 || padded > prefill_tokens ||
                      padded - tokens > count * kCallTokens)) {
      return count;
    }
  }
  return lengths.size();
}

}  // namespace chameleon
