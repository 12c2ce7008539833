#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace chameleon {

/// Returns which tokens may come next in a row whose text is constrained, one flag for each of the vocabulary, valid
/// until the next call. Called before each token is chosen, with the row's new tokens so far, by the thread that
/// generates; what it throws ends the row as its error. Allow the end of text where the text may end: where the row
/// ignores that token, allow it only where nothing else may follow.
using AllowedTokens = std::function<std::span<const bool>(std::span<const std::int64_t> token_ids)>;

/// How the tokens of a row are chosen, when it stops, and what is reported of them.
/// chameleon_deploy/runtime/sampling.py is the specification.
struct Sampling {
  double temperature = 0;                       ///< 0 is greedy, else at least 1e-5
  std::int64_t top_k = 0;                       ///< 0 keeps all
  double top_p = 1;                             ///< 1 keeps all
  double repetition_penalty = 1;                ///< 1 leaves the logits alone; counts the prompt and generated tokens
  std::uint64_t seed = 0;                       ///< the same seed gives the same tokens, here and in Python
  std::vector<std::int64_t> stop_token_ids{};   ///< stop after one of these, at most 1,024, besides the model's eos
  std::vector<std::string> stop{};              ///< stop before one of these: at most 16, of at most 1,024 characters
  double presence_penalty = 0;                  ///< -2 to 2, subtracted from the logit of every generated token
  double frequency_penalty = 0;                 ///< -2 to 2, subtracted as often as the token was generated
  std::map<std::int64_t, double> logit_bias{};  ///< token id -> -100 to 100, added to its logit; at most 1,024
  bool ignore_eos = false;                      ///< do not stop at the model's end of text, unless allowed_tokens
                                                ///< allows it
  std::optional<int> logprobs{};                ///< report log-probabilities, and those of 0 to 20 alternatives
  AllowedTokens allowed_tokens{};               ///< empty allows all
};

/// A token and the natural logarithm of its probability.
struct TokenLogprob {
  std::int64_t token_id;
  float logprob;
  bool operator==(const TokenLogprob&) const = default;
};

/// A chosen token; the other fields are empty unless Sampling::logprobs asks for them.
struct Choice {
  std::int64_t token_id;
  std::optional<float> logprob{};
  std::vector<TokenLogprob> top_logprobs{};  ///< of the most probable tokens, highest first
};

}  // namespace chameleon
