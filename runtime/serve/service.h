// What the server serves, and the states that it goes through: loading, ready, draining.
#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/engine.h"
#include "keys.h"
#include "metrics.h"
#include "models.h"
#include "token_names.h"

namespace chameleon::serve {

/// The options of the command that concern requests.
struct Settings {
  std::filesystem::path bundle;
  std::optional<Mode> mode;
  std::string provider = "cpu";
  std::optional<int> threads;
  bool share_weights = false;
  TrustedKeys trusted_keys;
  std::size_t rows = 8;
  std::size_t max_waiting = 256;
  std::size_t prefill_tokens = 256;
  std::optional<std::size_t> capacity;
  std::optional<std::size_t> max_factor_sets;
  std::optional<std::filesystem::path> adapters;  ///< directory of the files that requests may load
  std::size_t max_adapter_bytes = 1 << 30;
  double cohort_window_ms = 0;
  std::optional<std::filesystem::path> api_keys;
  std::size_t max_body_bytes = 4 << 20;
  std::size_t max_requests = 512;
  double drain_seconds = 30;
  bool log_prompts = false;
};

/// A loaded bundle and all that is made of it once.
struct Served {
  /// Throws an Error.
  Served(const Settings& settings, bool has_tenants, Metrics& metrics);

  Runtime runtime;
  Models models;
  TokenNames names;
  Metrics& metrics;
  std::string fingerprint;
  std::optional<std::filesystem::path> adapter_files;
  bool joins_cohorts;                    ///< of different requests
  std::size_t max_prompts;               ///< of one request, whatever it asks for
  std::atomic<bool> is_aborted = false;  ///< requests are cancelled
  std::mutex scorer;  ///< one prompt is scored at a time: many at once would only slow the engine down
  Engine engine;      ///< last: it uses all the others
};

/// One server. Requests are counted while they are worked on.
class Service {
 public:
  /// Throws InputError for a file of API keys that cannot be used.
  explicit Service(Settings settings);

  [[nodiscard]] const Settings& settings() const { return settings_; }
  [[nodiscard]] const Keys& keys() const { return keys_; }
  [[nodiscard]] Metrics& metrics() { return metrics_; }

  /// Load the bundle and start the engine. Throws an Error.
  void open();
  /// Throws ApiError unless requests can be taken.
  [[nodiscard]] Served& served();
  /// Throws ApiError unless requests can be taken, BundleChangedError where the bundle's files have changed.
  void check_health() { served().runtime.bundle().check_unchanged(); }

  /// Counts a request for as long as the result lives. Throws ApiError.
  [[nodiscard]] std::shared_ptr<void> begin_request();

  /// Finish what was accepted, for at most drain_seconds, and close the engine.
  void drain();
  /// End a drain at once: requests that have not ended are cancelled.
  void abort();

 private:
  Settings settings_;
  Keys keys_;
  Metrics metrics_;
  std::unique_ptr<Served> served_;
  std::atomic<bool> is_loaded_ = false, is_draining_ = false;
  std::atomic<std::size_t> requests_ = 0;
};

}  // namespace chameleon::serve
