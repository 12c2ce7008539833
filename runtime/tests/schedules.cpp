#include "schedules.h"

#include "engine/loop.h"
#include "engine/submission.h"

namespace chameleon::test {

namespace {

constexpr Seconds kExpired{1e-9};   // a deadline that is over at once
constexpr float kOverflow = 3e38F;  // factors of this value are finite, and the logits of their rows are not

Stream submit_to(Loop& loop, const Runtime& runtime, const Json& submit, std::size_t capacity) {
  SubmitOptions options{.mode = parse_mode(submit.at("mode").get<std::string>()), .n = submit.at("n")};
  options.max_new_tokens = submit.at("max_new_tokens").get<std::int64_t>();
  if (const Json& sampling = submit.at("sampling"); sampling.is_array()) {
    std::vector<Sampling> each;
    for (const Json& settings : sampling) each.push_back(read_sampling(settings));
    options.sampling = each;
  } else {
    options.sampling = read_sampling(sampling);
  }
  if (!submit.at("tenant").is_null()) options.tenant = submit.at("tenant").get<std::string>();
  if (!submit.at("adapt_tokens").is_null()) options.adapt_tokens = submit.at("adapt_tokens").get<std::size_t>();
  if (submit.at("expires").get<bool>()) options.deadline = kExpired;
  std::optional<CallerFactors> factors;
  if (!submit.at("rank").is_null()) {
    factors.emplace(submit.at("rank"), runtime.manifest().model);
    if (submit.at("overflows").get<bool>()) std::ranges::fill(factors->values, kOverflow);
    options.factors = factors->factors();
  }
  std::optional<CallerVectors> vectors;
  if (submit.contains("conditioning")) options.conditioning = vectors.emplace(submit["conditioning"]).matrix();
  const auto prompts = submit.at("prompts").get<std::vector<TokenIds>>();
  const Submission submission = prepare(runtime.impl(), capacity, prompts, std::move(options));
  form_cohort(runtime.impl(), std::span(&submission, 1), 0);
  loop.wait(submission.members);
  return Stream(submission.stream);
}

Json rows_of(const Stream& stream) {
  Json rows;
  for (const Generation& generation : stream.result()) {
    rows.push_back({{"token_ids", generation.token_ids},
                    {"text", generation.text},
                    {"cluster_id", generation.cluster_id},
                    {"finish_reason", to_string(generation.finish_reason)},
                    {"error", generation.error ? Json(generation.error->code()) : Json()},
                    {"num_logprobs", generation.token_logprobs.size()}});
  }
  return rows;
}

Json tokens_of(const Stream& stream) {
  Json tokens = Json::array();
  while (const auto token = stream.next()) tokens.push_back({token->row, token->token_id, token->text});
  return tokens;
}

}  // namespace

Json run_schedule(const Runtime& runtime, const Json& schedule) {
  const std::size_t capacity = schedule.at("capacity");
  FactorTable table(schedule.at("max_factor_sets"));
  const auto batch =
      open_batch(*runtime.impl().decoder, table, schedule.at("rows"), capacity, schedule.at("prefill_tokens"));
  Loop loop(*batch, table, runtime.tokenizer(), runtime.manifest().model.eos_token_id);
  const Json& submits = schedule.at("submits");
  std::vector<Stream> streams;
  Json iterations = Json::array();
  while (streams.size() < submits.size() || !loop.empty()) {
    while (streams.size() < submits.size() && submits[streams.size()].at("at") <= iterations.size()) {
      streams.push_back(submit_to(loop, runtime, submits[streams.size()], capacity));
    }
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if (submits[i].at("cancel_at") == iterations.size()) streams[i].cancel();
    }
    const auto [tokens, record] = loop.iterate();
    for (const auto& [stream, token] : tokens) stream->deliver(token);
    iterations.push_back({record.rows, record.factor_sets, record.factor_set_hits, record.chunk_tokens,
                          record.queued.size(), record.first_tokens.size(), record.later_tokens.size(),
                          record.finished.size(), batch->cached_tokens()});
  }
  Json result{{"rows", Json::array()}, {"tokens", Json::array()}, {"iterations", iterations}};
  for (const Stream& stream : streams) {
    result["rows"].push_back(rows_of(stream));
    result["tokens"].push_back(tokens_of(stream));
  }
  return result;
}

}  // namespace chameleon::test
