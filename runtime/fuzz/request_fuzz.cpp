// The bodies of requests to chameleon-server: any bytes give a request within its limits, or an ApiError.

#include <cmath>
#include <cstdlib>
#include <string_view>

#include "schemas.h"

using namespace chameleon::serve;

namespace {

void require(bool good) {
  if (!good) std::abort();
}

void check(const CompletionRequest& request) {
  require(request.n >= 1 && request.n <= 128 && request.best_of >= 1 && request.max_tokens >= 0 && request.top_k >= -1);
  require(request.temperature >= 0 && request.top_p > 0 && request.top_p <= 1 && request.repetition_penalty > 0);
  require(std::abs(request.presence_penalty) <= 2 && std::abs(request.frequency_penalty) <= 2);
  require(!request.logprobs || (*request.logprobs >= 0 && *request.logprobs <= 5));
  require(!request.adapt_tokens || *request.adapt_tokens >= 1);
  require(request.stop.size() <= 4);
  for (const auto& [id, bias] : request.logit_bias) require(std::abs(bias) <= 100);
  for (const std::int64_t id : request.stop_token_ids) require(id >= 0);
}

template <class Read>
void expect_request_or_error(const Read& read) {
  try {
    read();
  } catch (const ApiError& error) {
    require(error.status == 400 && error.code == "input_invalid");
    (void)to_text(error.body());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  expect_request_or_error([body] { check(CompletionRequest::of(body)); });
  expect_request_or_error([body] { (void)LoadAdapterRequest::of(body); });
  expect_request_or_error([body] { (void)UnloadAdapterRequest::of(body); });
  expect_request_or_error([body] { (void)TokenizeRequest::of(body); });
  expect_request_or_error([body] { (void)DetokenizeRequest::of(body); });
  return 0;
}
