#include "metrics.h"

#include <prometheus/text_serializer.h>

namespace chameleon::serve {

namespace {

const std::vector<double> kStep = {0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1};
const std::vector<double> kWait = {0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
const std::vector<double> kWhole = {0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300};
const std::vector<double> kRows = {1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128};

}  // namespace

Metrics::Metrics()
    : prompt_tokens_(counters("prompt_tokens_total", "Prompt tokens of rows that ended.").Add({})),
      generation_tokens_(counters("generation_tokens_total", "Tokens generated.").Add({})),
      failed_(counters("requests_failed_total", "Rows that an error ended.").Add({})),
      cancelled_(counters("requests_cancelled_total", "Rows that were cancelled.").Add({})),
      hits_(counters("factor_set_hits_total", "Rows admitted whose factor set was resident.").Add({})),
      success_(counters("request_success_total", "Rows that ended by themselves.")),
      requests_(counters("requests_total", "Prompts accepted.")),
      rejected_(counters("requests_rejected_total", "Requests refused, by error code.")),
      first_token_(histogram("time_to_first_token_seconds", "From submit to first token.", kWait)),
      later_token_(histogram("inter_token_latency_seconds", "From a token to the next.", kStep)),
      whole_(histogram("e2e_request_latency_seconds", "From submit to end.", kWhole)),
      queued_(histogram("request_queue_time_seconds", "From submit to admission.", kWait)),
      batch_rows_(histogram("batch_rows", "Rows in a step.", kRows)),
      batch_sets_(histogram("batch_factor_sets", "Factor sets in a step.", kRows)),
      step_(histogram("step_seconds", "Time of the decoder's step.", kStep)),
      chunk_(histogram("prefill_seconds", "Time of a chunk of a prompt.", kStep)),
      running_(gauge("num_requests_running", "Rows in the batch.")),
      waiting_(gauge("num_requests_waiting", "Rows that wait for a place.")),
      cache_usage_(gauge("kv_cache_usage_perc", "Part of the key-value cache in use, 0 to 1.")),
      factor_sets_(gauge("factor_sets_resident", "Factor sets in the table.")) {}

void Metrics::observe(const Iteration& iteration) {
  if (iteration.rows > 0) {
    step_.Observe(iteration.step.count());
    batch_rows_.Observe(static_cast<double>(iteration.rows));
    batch_sets_.Observe(static_cast<double>(iteration.factor_sets));
  }
  if (iteration.chunk_tokens > 0) chunk_.Observe(iteration.chunk.count());
  hits_.Increment(static_cast<double>(iteration.factor_set_hits));
  generation_tokens_.Increment(static_cast<double>(iteration.first_tokens.size() + iteration.later_tokens.size()));
  for (const Seconds seconds : iteration.queued) queued_.Observe(seconds.count());
  for (const Seconds seconds : iteration.first_tokens) first_token_.Observe(seconds.count());
  for (const Seconds seconds : iteration.later_tokens) later_token_.Observe(seconds.count());
  for (const FinishedRow& row : iteration.finished) finish(row);
}

void Metrics::accept(Mode mode, std::int64_t cluster_id) {
  requests_.Add({{"mode", std::string(to_string(mode))}, {"cluster", std::to_string(cluster_id)}}).Increment();
}

void Metrics::reject(const std::string& code) { rejected_.Add({{"reason", code}}).Increment(); }

std::string Metrics::text() {
  if (const Engine* engine = engine_) {
    const Stats stats = engine->stats();
    running_.Set(static_cast<double>(stats.running));
    waiting_.Set(static_cast<double>(stats.waiting));
    cache_usage_.Set(static_cast<double>(stats.cached_tokens) / static_cast<double>(stats.cache_capacity));
    factor_sets_.Set(static_cast<double>(stats.factor_sets));
  }
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

void Metrics::finish(const FinishedRow& row) {
  prompt_tokens_.Increment(static_cast<double>(row.prompt_tokens));
  whole_.Observe(row.seconds.count());
  if (row.finish_reason == FinishReason::cancelled) {
    cancelled_.Increment();
  } else if (row.finish_reason == FinishReason::error) {
    failed_.Increment();
  } else {
    success_.Add({{"finished_reason", std::string(to_string(row.finish_reason))}}).Increment();
  }
}

Metrics::Counters& Metrics::counters(const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name("chameleon_" + name).Help(help).Register(registry_);
}

prometheus::Histogram& Metrics::histogram(const std::string& name, const std::string& help,
                                          const std::vector<double>& buckets) {
  return prometheus::BuildHistogram().Name("chameleon_" + name).Help(help).Register(registry_).Add({}, buckets);
}

prometheus::Gauge& Metrics::gauge(const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name("chameleon_" + name).Help(help).Register(registry_).Add({});
}

}  // namespace chameleon::serve
