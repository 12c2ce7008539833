#include "schedules.h"

#include <algorithm>

#include "decode/shared_cache.h"
#include "engine/loop.h"

namespace chameleon::test {

namespace {

constexpr std::size_t kMostContinued = 80;  // tokens of a text that another continues

Stream submit_to(Loop& loop, const Runtime& runtime, const Json& submit, std::span<const Stream> streams,
                 std::size_t capacity) {
  Call call(submit, runtime.manifest().model);
  if (submit.contains("continues") && !submit.at("continues").is_null()) {
    const Stream& continued = streams[submit.at("continues").get<std::size_t>()];
    if (continued.done()) {
      TokenIds text = continued.prompts()[0];
      const TokenIds generated = continued.result()[0].token_ids;
      text.insert(text.end(), generated.begin(), generated.end());
      text.resize(std::min(text.size(), kMostContinued));
      for (TokenIds& prompt : call.prompts) prompt.insert(prompt.begin(), text.begin(), text.end());
    }
  }
  Tenant tenant;
  if (submit.contains("of")) {
    const Json& of = submit.at("of");
    tenant = {of.at("name"), of.at("weight")};
    if (!of.at("rows").is_null()) tenant.rows = of.at("rows").get<std::size_t>();
  }
  const Submission submission =
      prepare(runtime.impl(), call.prompts, call.generate, call.adapt, capacity, {}, {}, tenant);
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
  const Decoder& decoder = *runtime.impl().backend.decoder;
  std::unique_ptr<PrefixCache> prefixes;
  if (const std::size_t blocks = schedule.value("prefix_cache_blocks", std::size_t{0}); blocks > 0) {
    prefixes = dynamic_cast<const SharedCacheDecoder&>(decoder).prefix_cache(
        runtime.impl().bundle.digest, blocks * PrefixCache::kBlockTokens * decoder.token_bytes());
  }
  const auto batch = open_batch(decoder, table, schedule.at("rows"), capacity,
                                {schedule.at("prefill_tokens").get<std::size_t>()}, prefixes.get());
  Loop loop(*batch, table, runtime.tokenizer(), runtime.manifest().model.eos_token_id);
  const Json& submits = schedule.at("submits");
  std::vector<Stream> streams;
  Json iterations = Json::array();
  while (streams.size() < submits.size() || !loop.empty()) {
    while (streams.size() < submits.size() && submits[streams.size()].at("at") <= iterations.size()) {
      streams.push_back(submit_to(loop, runtime, submits[streams.size()], streams, capacity));
    }
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if (submits[i].at("cancel_at") == iterations.size()) streams[i].cancel();
    }
    const auto [tokens, record] = loop.iterate();
    for (const auto& [stream, token] : tokens) stream->deliver(token);
    iterations.push_back({record.rows, record.factor_sets, record.factor_set_hits, record.prefilled_tokens,
                          record.queued.size(), record.first_tokens.size(), record.later_tokens.size(),
                          record.finished.size(), batch->cached_tokens()});
  }
  Json result{{"rows", Json::array()}, {"tokens", Json::array()}, {"iterations", iterations}};
  for (const Stream& stream : streams) {
    result["rows"].push_back(rows_of(stream));
    result["tokens"].push_back(tokens_of(stream));
    if (prefixes != nullptr) result["cached_tokens"].push_back(stream.cached_tokens());
  }
  if (prefixes != nullptr) {
    const PrefixCacheStats stats = prefixes->stats("");
    result["prefix_cache"] = {stats.tokens, stats.bytes, stats.max_bytes, stats.queries, stats.hits, stats.evictions};
  }
  return result;
}

}  // namespace chameleon::test
