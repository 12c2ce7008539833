#include "chameleon/engine.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "decode/schedule.h"
#include "decode/shared_cache.h"
#include "engine/loop.h"
#include "machine.h"

namespace chameleon {

namespace {

constexpr std::size_t kCacheShare = 2;    // keys and values take at most half of the free memory by default
constexpr std::size_t kPrefixShare = 10;  // the prefix cache a tenth
constexpr std::size_t kMinCapacity = 16;  // tokens of a row: with less free memory an engine does not start

/// Throws InputError. The comparison is false for NaN.
template <class T>
void require_at_least(const char* name, T value, T least) {
  if (value >= least) return;
  throw InputError(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

EngineOptions checked(EngineOptions options) {
  require_at_least<std::size_t>("rows", options.rows, 1);
  require_at_least("prefill_tokens", options.prefill_tokens, kMinPrefillTokens);
  require_at_least<std::size_t>("max_factor_sets", options.max_factor_sets.value_or(1), 1);
  require_at_least("cohort_window", options.cohort_window.count(), 0.0);
  options.max_waiting = std::min(options.max_waiting, SIZE_MAX / 2);  // so that sums of it do not overflow
  return options;
}

/// The tokens of a row: those given, the model's positions, or what a share of the free memory holds. The decoder of a
/// device manages its own memory. Throws InputError, which names what does not fit.
std::size_t row_capacity(const Runtime::Impl& runtime, const EngineOptions& options) {
  const auto positions = static_cast<std::size_t>(runtime.bundle.manifest.model.max_positions);
  std::size_t wanted = std::min(options.capacity.value_or(positions), positions);
  const std::size_t token_bytes = runtime.backend.decoder->token_bytes();
  const auto free = free_memory();
  if (!free || token_bytes == 0) return wanted;
  // Divisions, since a product of the caller's numbers may overflow.
  const std::size_t most = *free / token_bytes / options.rows;
  if (!options.capacity) wanted = std::min(wanted, most / kCacheShare);
  const std::size_t least = options.capacity ? wanted : std::min(kMinCapacity, positions);
  if (wanted < least || wanted > most) {
    throw InputError("keys and values of " + std::to_string(options.rows) + " rows of " + std::to_string(least) +
                     " tokens do not fit: a token takes " + std::to_string(token_bytes) + " bytes, and " +
                     std::to_string(*free) + " bytes of memory are free: pass fewer rows or a smaller capacity");
  }
  return wanted;
}

/// An empty prefix cache; null if there is to be none. Throws InputError.
std::unique_ptr<PrefixCache> prefix_cache(const Runtime::Impl& runtime, const EngineOptions& options) {
  const auto* decoder = dynamic_cast<const SharedCacheDecoder*>(runtime.backend.decoder.get());
  if (decoder == nullptr && options.prefix_cache_bytes.value_or(0) > 0) {
    throw InputError("this decoder has no prefix cache: leave prefix_cache_bytes out");
  }
  const std::size_t max_bytes = options.prefix_cache_bytes.value_or(free_memory().value_or(0) / kPrefixShare);
  if (decoder == nullptr || max_bytes == 0) return nullptr;
  return decoder->prefix_cache(runtime.bundle.digest, max_bytes);
}

}  // namespace

struct Engine::Impl {
  Impl(const Runtime::Impl& driven, EngineOptions given);
  ~Impl() { close(Seconds{30}); }

  Stream submit(const Texts& prompts, const Generate& generate, const Adapt& adapt, OnToken on_token,
                const Tenant& tenant);
  [[nodiscard]] Stats stats() const;
  void close(Seconds drain);

  std::unique_ptr<PrefixCache> prefixes;  // or null
  mutable std::mutex mutex;               // guards `closing` and what the engine's thread and others share
  bool closing = false;

 private:
  struct OpenCohort {
    Clock::time_point closing;
    std::vector<Submission> submissions;
  };

  void run();
  bool take_commands();
  void take(Submission submission);
  void close_cohorts(Clock::time_point now);
  void hand_out(const Loop::Result& result);
  void fail(const std::exception& error);

  const Runtime::Impl& runtime;
  const EngineOptions options;
  const std::size_t capacity;

  // Of the engine's thread.
  FactorTable table;
  std::unique_ptr<Batch> batch;
  Loop loop;
  std::map<std::string, OpenCohort> open_cohorts;  // by cohort key

  // Guarded by the mutex.
  std::condition_variable changed;   // wakes the engine's thread
  std::vector<Submission> commands;  // submitted and not taken yet
  std::size_t present = 0;           // submitted rows that have not ended
  Accounts accounts;                 // of tenants
  bool cancelling = false;           // the time to drain is over
  bool ended = false;                // the thread
  std::condition_variable thread_ended;
  Stats current{};  // of the batch, after the last iteration

  std::atomic<std::int64_t> next_cohort = 0;
  std::mutex joining;  // guards what follows
  std::thread thread;
};

Engine::Impl::Impl(const Runtime::Impl& driven, EngineOptions given)
    : prefixes(prefix_cache(driven, given)),
      runtime(driven),
      options(checked(std::move(given))),
      capacity(row_capacity(driven, options)),
      table(options.max_factor_sets.value_or(options.rows)),
      batch(
          open_batch(*driven.backend.decoder, table, options.rows, capacity, {options.prefill_tokens}, prefixes.get())),
      loop(*batch, table, driven.tokenizer, driven.bundle.manifest.model.eos_token_id),
      accounts(options.rows, options.max_waiting) {
  current.rows = options.rows;
  current.cache_capacity = options.rows * capacity;
  thread = std::thread([this] { run(); });
}

Stream Engine::Impl::submit(const Texts& prompts, const Generate& generate, const Adapt& adapt, OnToken on_token,
                            const Tenant& tenant) {
  check(tenant);
  const std::size_t places = options.rows + options.max_waiting;
  const auto check_rows = [most = most_rows(places)](std::size_t rows) {
    if (rows <= most) return;
    throw InputError(std::to_string(rows) + " rows in one submit: this engine takes at most " + std::to_string(most));
  };
  check_rows(generate.n);  // before there are so many
  Submission submission = prepare(runtime, prompts, generate, adapt, capacity, std::move(on_token), {}, tenant);
  const std::size_t rows = submission.members.size();
  check_rows(rows);
  if (options.cohort_window == Seconds::zero() || !submission.cohort_key()) {
    form_cohort(runtime, std::span(&submission, 1), next_cohort++);
  }
  Stream stream(submission.stream);
  const std::lock_guard lock(mutex);
  if (closing) throw ClosedError("the engine is closed and takes no new requests");
  if (rows > most_rows(places - present)) {
    throw QueueFullError("no room for " + std::to_string(rows) + " rows, at most " +
                         std::to_string(options.max_waiting) + " may wait: try again later");
  }
  std::size_t prompt_tokens = 0;
  for (const TokenIds& prompt : stream.prompts()) prompt_tokens += prompt.size();
  accounts.begin(tenant, rows, prompt_tokens);
  present += rows;
  commands.push_back(std::move(submission));
  changed.notify_one();
  return stream;
}

Stats Engine::Impl::stats() const {
  const std::lock_guard lock(mutex);
  Stats stats = current;
  stats.waiting = present > stats.running ? present - stats.running : 0;
  return stats;
}

void Engine::Impl::close(Seconds drain) {
  {
    std::unique_lock lock(mutex);
    closing = true;
    changed.notify_one();
    thread_ended.wait_for(lock, bounded(drain), [this] { return ended; });
    cancelling = true;
    changed.notify_one();
  }
  const std::lock_guard one_at_a_time(joining);
  if (thread.joinable()) thread.join();
}

void Engine::Impl::run() {
  try {
    while (take_commands()) hand_out(loop.iterate());
  } catch (const std::exception& error) {  // a fault of this library must not leave a caller waiting
    fail(error);
  }
  const std::lock_guard lock(mutex);
  ended = true;
  thread_ended.notify_all();
}

/// Take everything that was submitted; wait for it if nothing else is to be done. False at the end.
bool Engine::Impl::take_commands() {
  std::unique_lock lock(mutex);
  const auto is_awake = [&] { return !commands.empty() || !loop.empty() || closing; };
  if (open_cohorts.empty()) {
    changed.wait(lock, is_awake);
  } else {
    const auto first =
        std::ranges::min_element(open_cohorts, {}, [](const auto& cohort) { return cohort.second.closing; });
    changed.wait_until(lock, first->second.closing, is_awake);
  }
  for (Submission& submission : std::exchange(commands, {})) take(std::move(submission));
  close_cohorts(closing ? Clock::time_point::max() : Clock::now());  // nothing joins a cohort of a closing engine
  if (cancelling) loop.cancel();
  return !closing || present > 0 || !loop.empty();
}

void Engine::Impl::take(Submission submission) {
  const auto key = submission.cohort_key();
  if (options.cohort_window == Seconds::zero() || !key) return loop.wait(submission.members);
  const auto closing_time = Clock::now() + std::chrono::duration_cast<Clock::duration>(bounded(options.cohort_window));
  const auto cohort = open_cohorts.try_emplace(*key, OpenCohort{closing_time, {}}).first;
  cohort->second.submissions.push_back(std::move(submission));
}

void Engine::Impl::close_cohorts(Clock::time_point now) {
  std::erase_if(open_cohorts, [&](const auto& cohort) {
    const auto& [closing_time, submissions] = cohort.second;
    if (now < closing_time) return false;
    form_cohort(runtime, submissions, next_cohort++);
    for (const Submission& submission : submissions) loop.wait(submission.members);
    return true;
  });
}

void Engine::Impl::hand_out(const Loop::Result& result) {
  {
    const std::lock_guard lock(mutex);
    present -= result.iteration.finished.size();
    for (const FinishedRow& row : result.iteration.finished) accounts.end(row);
    current.running = batch->members().size();
    current.cached_tokens = batch->cached_tokens();
    current.factor_sets = table.size();
  }
  for (const auto& [stream, token] : result.tokens) stream->deliver(token);
  if (!options.observe) return;
  try {
    options.observe(result.iteration);
  } catch (...) {  // NOLINT: an observer's fault must not end a request
  }
}

/// End everything that was accepted, and accept nothing more.
void Engine::Impl::fail(const std::exception& error) {
  {
    const std::lock_guard lock(mutex);
    closing = true;
    for (const Submission& submission : std::exchange(commands, {})) loop.wait(submission.members);
  }
  for (const auto& [key, cohort] : open_cohorts) {
    for (const Submission& submission : cohort.submissions) loop.wait(submission.members);
  }
  hand_out(loop.fail(RequestError(std::string("the engine failed: ") + error.what())));
}

Engine::Engine(const Runtime& runtime, EngineOptions options)
    : impl_(std::make_unique<Impl>(runtime.impl(), std::move(options))) {}
Engine::Engine(Engine&&) noexcept = default;
Engine::~Engine() = default;

Stream Engine::submit(Texts prompts, const Generate& generate, const Adapt& adapt, OnToken on_token,
                      const Tenant& tenant) {
  return impl_->submit(prompts, generate, adapt, std::move(on_token), tenant);
}

bool Engine::closed() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->closing;
}

Stats Engine::stats() const { return impl_->stats(); }

PrefixCacheStats Engine::prefix_cache_stats(const std::string& salt) const {
  return impl_->prefixes == nullptr ? PrefixCacheStats{} : impl_->prefixes->stats(salt);
}

void Engine::clear_prefix_cache(const std::string& salt) {
  if (impl_->prefixes != nullptr) impl_->prefixes->clear(salt);
}

void Engine::close(Seconds drain) { impl_->close(drain); }

}  // namespace chameleon
