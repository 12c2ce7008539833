// Prometheus metrics: what the engine reports of every iteration, and what the server refuses.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "chameleon/engine.h"

namespace chameleon::serve {

/// The metrics of one server. Names are vLLM's where the meaning is the same. A row is one continuation of one prompt.
class Metrics {
 public:
  Metrics();

  /// Read the gauges from an engine, which must outlive this, whenever they are asked for.
  void watch(const Engine& engine) { engine_ = &engine; }
  /// Called by the engine after every iteration.
  void observe(const Iteration& iteration);
  /// Count an accepted prompt.
  void accept(Mode mode, std::int64_t cluster_id);
  /// Count a refused request, by its error code.
  void reject(const std::string& code);
  /// In Prometheus' text format.
  [[nodiscard]] std::string text();

 private:
  using Counters = prometheus::Family<prometheus::Counter>;

  void finish(const FinishedRow& row);
  Counters& counters(const std::string& name, const std::string& help);
  prometheus::Histogram& histogram(const std::string& name, const std::string& help,
                                   const std::vector<double>& buckets);
  prometheus::Gauge& gauge(const std::string& name, const std::string& help);

  prometheus::Registry registry_;
  prometheus::Counter &prompt_tokens_, &generation_tokens_, &failed_, &cancelled_, &hits_;
  Counters &success_, &requests_, &rejected_;
  prometheus::Histogram &first_token_, &later_token_, &whole_, &queued_, &batch_rows_, &batch_sets_, &step_, &chunk_;
  prometheus::Gauge &running_, &waiting_, &cache_usage_, &factor_sets_;
  std::atomic<const Engine*> engine_ = nullptr;
};

}  // namespace chameleon::serve
