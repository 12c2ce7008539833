#include "service.h"

#include <chrono>
#include <thread>

namespace chameleon::serve {

namespace {

std::string name_of(const std::filesystem::path& bundle) {
  return std::filesystem::weakly_canonical(bundle).filename().string();
}

EngineOptions engine_options(const Settings& settings, Metrics& metrics) {
  return {.rows = settings.rows,
          .max_waiting = settings.max_waiting,
          .prefill_tokens = settings.prefill_tokens,
          .max_factor_sets = settings.max_factor_sets,
          .cohort_window = Seconds(settings.cohort_window_ms / 1000),
          .capacity = settings.capacity,
          .observe = [&metrics](const Iteration& iteration) { metrics.observe(iteration); }};
}

/// The factors of all clusters are made now, so that the first request does not wait for them.
const Runtime& warmed(const Runtime& runtime, Mode mode) {
  AdaptOptions options{.mode = mode};
  if (mode == Mode::tenant) options.tenants = {""};
  const std::vector<float> zeros(static_cast<std::size_t>(runtime.manifest().adaptation.conditioning_size));
  if (mode == Mode::request && !zeros.empty()) options.conditioning = Matrix{1, zeros.size(), zeros};
  (void)runtime.adapt(std::vector<TokenIds>{{0}}, options);
  return runtime;
}

}  // namespace

Served::Served(const Settings& settings, bool has_tenants, Metrics& metrics_)
    : runtime(settings.bundle, {.provider = settings.provider,
                                .mode = {},
                                .threads = settings.threads,
                                .share_weights = settings.share_weights,
                                .trusted_keys = settings.trusted_keys,
                                .max_adapter_bytes = settings.max_adapter_bytes}),
      models(name_of(settings.bundle), runtime, settings.mode, has_tenants, settings.capacity),
      names(runtime.tokenizer(), runtime.manifest().model.vocab_size),
      metrics(metrics_),
      fingerprint(runtime.bundle().digest.substr(0, 16) + "-" + runtime.provider() + "-" +
                  runtime.manifest().precision),
      adapter_files(settings.adapters),
      joins_cohorts(settings.cohort_window_ms > 0),
      max_prompts(settings.rows + settings.max_waiting),
      engine(warmed(runtime, models.default_mode()), engine_options(settings, metrics)) {
  metrics.watch(engine);
}

Service::Service(Settings settings) : settings_(std::move(settings)), keys_(settings_.api_keys) {}

void Service::open() {
  served_ = std::make_unique<Served>(settings_, keys_.are_required(), metrics_);
  is_loaded_ = true;
}

Served& Service::served() {
  if (is_draining_) throw ApiError(503, "draining", "the server finishes what it has and takes nothing new");
  if (!is_loaded_) throw ApiError(503, "loading", "the server is loading its bundle");
  if (served_->engine.closed()) throw ApiError(503, "closed", "the engine has stopped: restart the server");
  return *served_;
}

std::shared_ptr<void> Service::begin_request() {
  const std::size_t others = requests_++;
  std::shared_ptr<void> counted(nullptr, [this](void*) { --requests_; });
  if (others >= settings_.max_requests) {
    throw ApiError(429, "too_many_requests", std::to_string(others) + " requests are being worked on: try again later");
  }
  return counted;
}

void Service::abort() {
  if (is_loaded_) served_->is_aborted = true;
}

void Service::drain() {
  is_draining_ = true;
  if (!is_loaded_) return;
  const auto end = std::chrono::steady_clock::now() + Seconds(settings_.drain_seconds);
  served_->engine.close(Seconds(settings_.drain_seconds));
  // Those that score are not the engine's.
  while (requests_ > 0 && std::chrono::steady_clock::now() < end && !served_->is_aborted) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

}  // namespace chameleon::serve
