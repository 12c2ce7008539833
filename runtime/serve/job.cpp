#include "job.h"

#include <algorithm>
#include <ctime>
#include <random>
#include <string_view>

#include "prompts.h"
#include "sampling.h"

namespace chameleon::serve {

namespace {

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

/// Check what a field's own range cannot say. Throws ApiError.
void check_fields(const CompletionRequest& request, Mode mode, const Served& served) {
  const auto require = [](bool good, const char* param, const std::string& message) {
    if (!good) throw ApiError(400, "input_invalid", message, param);
  };
  const bool joins_others = served.joins_cohorts && (mode == Mode::cohort || mode == Mode::tenant);
  require(request.max_tokens > 0 || request.echo, "max_tokens", "max_tokens may be 0 only with echo");
  require(request.best_of == 1 || request.best_of == request.n, "best_of", "best_of must be 1 or equal n");
  require(request.suffix.empty(), "suffix", "suffix is not supported: leave it out");
  require(!request.stream_options || request.stream, "stream_options", "stream_options needs stream");
  require(!request.echo || !request.logprobs || !joins_others, "echo",
          "log-probabilities of a prompt cannot be given in mode '" + std::string(to_string(mode)) +
              "' while its cohort joins other requests");
}

Sampling sampling_of(const CompletionRequest& request, const Served& served) {
  Sampling sampling{.temperature = request.temperature,
                    .top_k = std::max<std::int64_t>(request.top_k, 0),
                    .top_p = request.top_p,
                    .repetition_penalty = request.repetition_penalty,
                    .seed = request.seed ? *request.seed : random_seed(),
                    .stop_token_ids = request.stop_token_ids,
                    .stop = request.stop,
                    .presence_penalty = request.presence_penalty,
                    .frequency_penalty = request.frequency_penalty,
                    .logit_bias = request.logit_bias,
                    .ignore_eos = request.ignore_eos};
  if (request.logprobs) sampling.logprobs = static_cast<int>(*request.logprobs);
  try {
    check(sampling, served.runtime.manifest().model.vocab_size);
  } catch (const TokenError& error) {
    throw ApiError(400, error.code(), error.what(), "logit_bias");
  } catch (const InputError& error) {
    const std::string message = error.what();
    throw api_error(error, message.substr(0, message.find(' ')));  // it begins with the setting
  }
  return sampling;
}

Stream submit(const Job& job, const Sampling& sampling, const std::optional<std::string>& tenant) {
  // One Sampling per prompt: each prompt as if it were alone.
  SubmitOptions options{.max_new_tokens = job.request.max_tokens,
                        .sampling = std::vector(job.ids.size(), sampling),
                        .mode = job.meant.mode,
                        .adapter = job.meant.adapter,
                        .n = static_cast<std::size_t>(job.request.n)};
  if (job.meant.mode == Mode::tenant) options.tenant = tenant;
  if (job.request.conditioning) options.conditioning = job.request.conditioning->matrix();
  if (job.request.adapt_tokens) options.adapt_tokens = static_cast<std::size_t>(*job.request.adapt_tokens);
  try {
    return job.served.engine.submit(job.ids, std::move(options));
  } catch (const InputError& error) {
    const bool is_of_vectors = job.request.conditioning && std::string_view(error.what()).starts_with("conditioning");
    throw api_error(error, is_of_vectors ? "conditioning" : job.request.n > 1 ? "n" : "prompt");
  }
}

}  // namespace

Job::~Job() {
  if (stream) stream->cancel();
}

Json Job::completion(Json choices) const {
  return {{"id", id},
          {"object", "text_completion"},
          {"created", created},
          {"model", meant.model},
          {"system_fingerprint", served.fingerprint},
          {"choices", std::move(choices)}};
}

Json Job::usage(std::size_t new_tokens) const {
  std::size_t prompt_tokens = 0;
  for (const TokenIds& prompt : ids) prompt_tokens += prompt.size();
  return {{"prompt_tokens", prompt_tokens},
          {"completion_tokens", new_tokens},
          {"total_tokens", prompt_tokens + new_tokens}};
}

std::shared_ptr<Job> prepare(CompletionRequest request, Served& served, const std::optional<std::string>& tenant,
                             const std::string& request_id) {
  const auto job = std::make_shared<Job>(std::move(request), served);
  job->meant = served.models.resolve(job->request.model, job->request.mode);
  check_fields(job->request, job->meant.mode, served);
  const Sampling sampling = sampling_of(job->request, served);
  job->ids = encode(job->request.prompt, "prompt", served);
  if (job->request.max_tokens > 0) {
    job->stream = submit(*job, sampling, tenant);
    job->cluster_ids = job->stream->cluster_ids();
  } else {
    job->cluster_ids = served.runtime.adapt(job->ids, {.mode = Mode::none}).cluster_ids;
  }
  for (const std::int64_t cluster_id : job->cluster_ids) served.metrics.accept(job->meant.mode, cluster_id);
  job->id = "cmpl-" + request_id;
  job->created = std::time(nullptr);
  return job;
}

}  // namespace chameleon::serve
