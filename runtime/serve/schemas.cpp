#include "schemas.h"

namespace chameleon::serve {

namespace {

constexpr double kMaxChoices = 128;  // of one prompt
constexpr double kMaxLogprobs = 5;
constexpr std::size_t kMaxStops = 4;

/// A string, or a list of them.
struct Stop {
  std::vector<std::string>& strings;
};

void read(const Json& json, const std::string& at, Stop& stop, const Limits& limits) {
  if (json.is_string()) {
    serve::read(json, at, stop.strings.emplace_back(), limits);
    return;
  }
  if (!json.is_array()) fail_expected("str | array", json, at, limits);
  if (json.size() > kMaxStops) {
    throw ApiError(400, "input_invalid", "the body is not valid: Expected `array` of length <= 4 - at `$.stop`",
                   "stop");
  }
  serve::read(json, at, stop.strings, limits);
}

}  // namespace

CompletionRequest CompletionRequest::of(std::string_view body) {
  CompletionRequest request;
  Stop stop{request.stop};
  std::optional<std::string> user;
  const Limits penalty{.least = -2, .most = 2}, positive{.least = 0, .is_least_excluded = true},
      nullable{.is_nullable = true};
  const Fields fields = Fields::of_body(body);
  fields.required("prompt", request.prompt)
      .optional("model", request.model)
      .optional("max_tokens", request.max_tokens, {.least = 0})
      .optional("temperature", request.temperature, {.least = 0})
      .optional("top_p", request.top_p, {.least = 0, .most = 1, .is_least_excluded = true})
      .optional("n", request.n, {.least = 1, .most = kMaxChoices})
      .optional("best_of", request.best_of, {.least = 1})
      .optional("stream", request.stream)
      .optional("stop", stop, nullable)
      .optional("seed", request.seed)
      .optional("logprobs", request.logprobs, {.least = 0, .most = kMaxLogprobs})
      .optional("echo", request.echo)
      .optional("logit_bias", request.logit_bias, {.least = -100, .most = 100, .is_nullable = true})
      .optional("presence_penalty", request.presence_penalty, penalty)
      .optional("frequency_penalty", request.frequency_penalty, penalty)
      .optional("suffix", request.suffix, nullable)
      .optional("user", user)
      .optional("top_k", request.top_k, {.least = -1})
      .optional("repetition_penalty", request.repetition_penalty, positive)
      .optional("stop_token_ids", request.stop_token_ids, {.least = 0, .is_nullable = true})
      .optional("ignore_eos", request.ignore_eos)
      .optional("return_token_ids", request.return_token_ids)
      .optional("return_tokens_as_token_ids", request.return_tokens_as_token_ids)
      .optional("mode", request.mode)
      .optional("adapt_tokens", request.adapt_tokens, {.least = 1})
      .optional("conditioning", request.conditioning);
  if (const auto options = fields.object("stream_options")) {
    StreamOptions& found = request.stream_options.emplace();
    options->optional("include_usage", found.include_usage)
        .optional("continuous_usage_stats", found.continuous_usage_stats);
  }
  return request;
}

LoadAdapterRequest LoadAdapterRequest::of(std::string_view body) {
  LoadAdapterRequest request;
  Fields::of_body(body).required("lora_name", request.lora_name).required("lora_path", request.lora_path);
  return request;
}

UnloadAdapterRequest UnloadAdapterRequest::of(std::string_view body) {
  UnloadAdapterRequest request;
  Fields::of_body(body).required("lora_name", request.lora_name);
  return request;
}

TokenizeRequest TokenizeRequest::of(std::string_view body) {
  TokenizeRequest request;
  Fields::of_body(body)
      .required("prompt", request.prompt)
      .optional("model", request.model)
      .optional("add_special_tokens", request.add_special_tokens)
      .optional("return_token_strs", request.return_token_strs);
  return request;
}

DetokenizeRequest DetokenizeRequest::of(std::string_view body) {
  DetokenizeRequest request;
  Fields::of_body(body).required("tokens", request.tokens, {.least = 0}).optional("model", request.model);
  return request;
}

}  // namespace chameleon::serve
