#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "chameleon/error.h"
#include "chameleon/per_prompt.h"
#include "chameleon/sampling.h"

namespace chameleon {

using Seconds = std::chrono::duration<double>;

/// Why a row ended. An Engine gives every reason, Runtime::generate `error` only where it is asked to.
enum class FinishReason { stop, length, cancelled, deadline, error };

CHAMELEON_EXPORT std::string_view to_string(FinishReason reason);

/// A continued prompt. token_ids are the new tokens, a stop token included; text is without the stop token or stop
/// string.
struct Generation {
  std::vector<std::int64_t> token_ids;
  std::string text;
  std::int64_t cluster_id = 0;
  FinishReason finish_reason = FinishReason::length;
  std::vector<float> token_logprobs{};  ///< of each of token_ids; empty unless Sampling::logprobs is set
  std::vector<std::vector<TokenLogprob>> top_logprobs{};  ///< the most probable tokens at each place, likewise
  std::optional<Error> error{};                           ///< what ended the row, if finish_reason is error
};

/// One step of one row. text is the part that can be shown now: it may be empty, or have the characters of several
/// tokens.
struct Token {
  std::size_t row;
  std::int64_t token_id;  ///< -1 if the row ended without a new token: cancelled, past its deadline, or failed
  std::string text;
  std::shared_ptr<const Generation> generation;  ///< set on a row's last Token
  std::optional<float> logprob{};                ///< of token_id, unless Sampling::logprobs is not set
  std::vector<TokenLogprob> top_logprobs{};      ///< of the most probable tokens, highest first
};

/// Called for every token, after each step in the order of the rows. Return false to cancel this row, which then ends
/// before the next step; the others continue.
using OnToken = std::function<bool(const Token&)>;

/// What becomes of the error of one row, whose logits are not finite or whose tokens cannot be decoded.
enum class OnError {
  raise,  ///< it is thrown and ends the batch
  row,    ///< it ends that row alone, with finish reason `error` and its Generation::error
};

/// Options of one call: they say how its prompts are continued.
struct Generate {
  /// At least 1, one number or one per prompt. The tokens that a row can hold are a limit too.
  PerPrompt<std::int64_t> max_new_tokens = std::int64_t{20};
  /// One Sampling for all, where row i draws from random stream i, or one per prompt, where its continuation k draws
  /// from stream k, so that a row does not depend on its place in the batch.
  PerPrompt<Sampling> sampling = Sampling{};
  std::size_t n = 1;                  ///< continuations per prompt, at most 65,536; row i * n + k is continuation k of
                                      ///< prompt i
  std::optional<Seconds> deadline{};  ///< from now, after which rows that have not ended finish as deadline
  /// On the CPU, in fp32: while a single row is generated, up to this many tokens, at most 16, are drafted by prompt
  /// lookup and read in one call, which is faster where the text repeats itself, and slower elsewhere. The tokens are
  /// those of plain decoding. 0 is off.
  std::int64_t prompt_lookup_num_tokens = 0;
  /// An Engine's prefix cache shares keys and values only among requests of equal salts.
  std::string cache_salt{};
  /// Whether an Engine's prefix cache may give this request keys and values that steps wrote, and keep its own: near
  /// those of a prompt that is read, but not bitwise equal. False takes what is equal.
  bool cache_generated = true;
};

}  // namespace chameleon
