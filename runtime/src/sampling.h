#pragma once

#include <set>
#include <span>

#include "chameleon/sampling.h"

namespace chameleon {

/// The largest number of alternatives that are reported for a token.
inline constexpr int kMaxLogprobs = 20;
/// What is looked at for every token is bounded, so that no request slows the steps that it shares with others.
inline constexpr std::size_t kMaxStopStrings = 16, kMaxStopCharacters = 1024;
inline constexpr std::size_t kMaxStopTokenIds = 1024, kMaxBiases = 1024;

/// Throws InputError for a setting out of range, and TokenError for a bias of a token outside the vocabulary.
void check(const Sampling& sampling, std::int64_t vocab_size);

/// The number in [0, 1) that decides step `step` of stream `stream`.
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step);

/// The tokens of one row, as the penalties count them.
class TokenCounts {
 public:
  explicit TokenCounts(std::span<const std::int64_t> prompt, std::span<const std::int64_t> generated = {});
  /// Count a generated token.
  void append(std::int64_t token_id);
  /// Tokens of the prompt and generated ones.
  [[nodiscard]] const std::set<std::int64_t>& seen() const { return seen_; }
  /// Generated tokens, and how often each was generated.
  [[nodiscard]] const std::map<std::int64_t, std::int64_t>& generated() const { return generated_; }

 private:
  std::set<std::int64_t> seen_;
  std::map<std::int64_t, std::int64_t> generated_;
};

/// Chooses the tokens of one row, one after another.
class Sampler {
 public:
  /// prompt  token ids of the row
  /// stream  which of the seed's random streams it draws from
  Sampler(Sampling sampling, std::span<const std::int64_t> prompt, std::uint64_t stream);

  [[nodiscard]] const Sampling& sampling() const { return sampling_; }
  /// Whether a token is one of the stop_token_ids.
  [[nodiscard]] bool is_stop_token(std::int64_t token_id) const;

  /// The next token, by the row's own random number. It is not counted until `append`. See `choose` below.
  [[nodiscard]] Choice choose(std::span<const float> logits, std::span<const bool> allowed = {}) const;
  /// Append a token to the row.
  void append(std::int64_t token_id);

 private:
  Sampling sampling_;
  std::uint64_t stream_, step_ = 0;
  TokenCounts counts_;
};

/// The next token id, the same as in Python to the last bit (chameleon_deploy/runtime/sampling.py states the steps).
///
/// logits   [vocab]
/// counts   the row's tokens so far
/// u        in [0, 1), from `uniform`; not used when greedy
/// allowed  [vocab], the tokens to choose from; empty allows all
///
/// Throws NumericError when a logit is not finite, and InputError when no token is allowed.
std::int64_t choose(std::span<const float> logits, const TokenCounts& counts, const Sampling& sampling, double u,
                    std::span<const bool> allowed = {});

/// The log-probability of a chosen token, and the `count` most probable tokens with theirs.
///
/// logits  [vocab], raw
///
/// Throws NumericError when a logit is not finite.
Choice log_probabilities(std::span<const float> logits, std::int64_t token_id, int count);

/// Index of the highest value, the first of equals; of the first NaN where there is one, as numpy has it.
std::size_t argmax(std::span<const float> values);

}  // namespace chameleon
