// The bodies of requests. openapi.json describes them, and chameleon_deploy/serve/schemas.py is the same in Python.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bodies.h"

namespace chameleon::serve {

struct StreamOptions {
  bool include_usage = false;
  bool continuous_usage_stats = false;
};

struct CompletionRequest {
  Prompts prompt;
  std::optional<std::string> model;
  std::int64_t max_tokens = 16;  ///< 0 only with echo
  double temperature = 1;
  double top_p = 1;
  std::int64_t n = 1;
  std::int64_t best_of = 1;  ///< 1, or the value of n
  bool stream = false;
  std::optional<StreamOptions> stream_options;
  std::vector<std::string> stop;
  std::optional<std::uint64_t> seed;
  std::optional<std::int64_t> logprobs;
  bool echo = false;
  std::map<std::int64_t, double> logit_bias;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  std::string suffix;
  std::int64_t top_k = 0;  ///< 0 and -1 keep all
  double repetition_penalty = 1;
  std::vector<std::int64_t> stop_token_ids;
  bool ignore_eos = false;
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;
  std::optional<Mode> mode;
  std::optional<std::int64_t> adapt_tokens;  ///< embed only the first so many tokens
  std::optional<Vectors> conditioning;       ///< mode request of a bundle that takes the caller's vectors

  /// Throws ApiError.
  static CompletionRequest of(std::string_view body);
};

/// lora_path is the name of a file in the server's directory of adapters.
struct LoadAdapterRequest {
  std::string lora_name, lora_path;

  static LoadAdapterRequest of(std::string_view body);
};

struct UnloadAdapterRequest {
  std::string lora_name;

  static UnloadAdapterRequest of(std::string_view body);
};

struct TokenizeRequest {
  std::string prompt;
  std::optional<std::string> model;
  bool add_special_tokens = false;  ///< without effect: byte-level vocabularies add none
  bool return_token_strs = false;

  static TokenizeRequest of(std::string_view body);
};

struct DetokenizeRequest {
  std::vector<std::int64_t> tokens;
  std::optional<std::string> model;

  static DetokenizeRequest of(std::string_view body);
};

}  // namespace chameleon::serve
