/// Continuous batching: one thread drives the decoder, any number of threads submit to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/iteration.h"
#include "chameleon/runtime.h"
#include "chameleon/stream.h"

namespace chameleon {

struct EngineOptions {
  std::size_t rows = 8;              ///< places in the batch, at least 1
  std::size_t max_waiting = 256;     ///< rows that may wait for a place; a submit beyond that, or of several rows
                                     ///< that are more than half of what is free, throws QueueFullError
  std::size_t prefill_tokens = 256;  ///< prompt tokens prefilled between two steps of the running rows, at least 8
  std::optional<std::size_t> max_factor_sets{};  ///< different sets in the batch at a time: by default, as many as rows
  /// How long a submit in mode cohort, or in mode tenant of the same tenant, waits for others that join its cohort;
  /// with 0 a cohort is the prompts of one submit.
  Seconds cohort_window{0};
  /// Tokens per row that the key-value cache holds: by default, the model's positions, or as many as fit into half of
  /// the free memory. InputError for what does not fit into the free memory.
  std::optional<std::size_t> capacity{};
  /// Bytes of keys and values that later prompts may begin with: by default, a tenth of the free memory; 0 keeps none.
  /// Decoders without slots keep none, and InputError tells who asks for it.
  std::optional<std::size_t> prefix_cache_bytes{};
  /// Called by the engine's thread after every iteration; must be quick. Its exceptions are ignored.
  std::function<void(const Iteration&)> observe{};
};

/// Whose rows a submit has, and what the tenant may take of an engine.
struct Tenant {
  std::string name{};                              ///< whose submits all have the same weight and limits; those without
                                                   ///< one are one tenant
  std::int64_t weight = 1;                         ///< of its share, 1 to 1,000: while several tenants wait, rows go to
                                                   ///< them by weight
  std::optional<std::size_t> rows{};               ///< of it in the batch at a time, at most
  std::optional<std::size_t> max_waiting{};        ///< rows of it that may wait, at most
  std::optional<std::size_t> tokens_per_minute{};  ///< that it may use, of prompts and new ones
  bool operator==(const Tenant&) const = default;
};

/// The state of an engine at one moment.
struct Stats {
  std::size_t running, waiting;  ///< rows in the batch, and rows that wait for a place
  std::size_t rows;              ///< places in the batch
  std::size_t cached_tokens;     ///< tokens in the key-value cache
  std::size_t cache_capacity;    ///< tokens that it can hold
  std::size_t factor_sets;       ///< resident factor sets
};

/// The state of a prefix cache.
struct PrefixCacheStats {
  std::size_t tokens, bytes, max_bytes;  ///< whose keys and values are cached; bytes that these take, of max_bytes
  std::size_t queries, hits;             ///< prompt tokens that were looked for, and those that were found and used
  std::size_t evictions;                 ///< tokens that had to make room for others
  bool operator==(const PrefixCacheStats&) const = default;
};

/// Generates for many callers at once on one runtime. Every function may be called from any thread, but `close` not
/// from a callback.
class CHAMELEON_EXPORT Engine {
 public:
  /// Start the engine's thread. Throws InputError, or LengthError where there is no memory for the cache.
  /// runtime: must outlive the engine; other threads may use it too and share the processor
  explicit Engine(const Runtime& runtime, EngineOptions options = {});
  Engine(Engine&&) noexcept;
  /// As `close`.
  ~Engine();

  /// Queue every prompt and return at once. Every argument is checked before this returns.
  /// on_token: called by the engine's thread for every token, in place of Stream::next; must be quick. An exception
  /// cancels the row too
  /// tenant: whose share of the engine the rows take; not those of mode tenant
  /// Throws InputError, TokenError, LengthError (a prompt that no row can hold), ModeError, FactorsError, AdapterError,
  /// ProviderError (drafts on a GPU), QueueFullError, RateLimitError, or ClosedError after `close`.
  Stream submit(Texts prompts, const Generate& generate = {}, const Adapt& adapt = {}, OnToken on_token = {},
                const Tenant& tenant = {});

  /// Whether no request is accepted any more: after `close`, or a fault of the thread.
  [[nodiscard]] bool closed() const;
  [[nodiscard]] Stats stats() const;
  /// The state of the prefix cache, with the tokens and bytes of salts that begin with `salt`.
  [[nodiscard]] PrefixCacheStats prefix_cache_stats(const std::string& salt = {}) const;
  /// Forget the keys and values of requests whose cache_salt begins with `salt`; their rows are not affected.
  void clear_prefix_cache(const std::string& salt = {});

  /// Accept no new request, finish the accepted ones, and end the thread. A second call does nothing.
  /// drain: after which rows that have not ended are cancelled
  void close(Seconds drain = Seconds{30});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace chameleon
