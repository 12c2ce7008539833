#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#include "chameleon.h"
#include "chameleon/engine.h"

struct chameleon_error {
  std::string code, message;
};
struct chameleon_runtime {
  chameleon::Runtime value;
};
struct chameleon_adapters {
  std::vector<chameleon::AdapterInfo> value;
  std::vector<std::vector<const char*>> targets;  // of each
};
struct chameleon_adaptation {
  chameleon::Adaptation value;
};
struct chameleon_scores {
  std::vector<chameleon::Score> value;
};
struct chameleon_generations {
  std::vector<chameleon::Generation> value;
};
struct chameleon_engine {
  chameleon::Engine value;
};
struct chameleon_stream {
  chameleon::Stream value;
  chameleon::Token token{};  // the last one, which the caller may still look at
};

// Handed out as they are.
static_assert(sizeof(chameleon_token_logprob) == sizeof(chameleon::TokenLogprob) &&
              offsetof(chameleon_token_logprob, logprob) == offsetof(chameleon::TokenLogprob, logprob));

namespace {

using namespace chameleon;

chameleon_error out_of_memory{"error", "out of memory"};  // made beforehand: there may be no memory for it later

/// Run `work` and turn any exception into an error.
template <class Work>
chameleon_error* guarded(const Work& work) noexcept {
  try {
    try {
      work();
      return nullptr;
    } catch (const Error& error) {
      return new chameleon_error{error.code(), error.what()};
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& error) {
      return new chameleon_error{"error", error.what()};
    }
  } catch (const std::bad_alloc&) {
    return &out_of_memory;
  }
}

/// Throws InputError for NULL, of which C++ makes no text and no path.
const char* required(const char* text, const char* name) {
  if (text == nullptr) throw InputError(std::string(name) + " is NULL");
  return text;
}

/// A chameleon_batch in the types of the C++ interface.
struct Batch {
  std::vector<std::string> strings;
  std::vector<TokenIds> ids;
  Adapt adapt;

  explicit Batch(const chameleon_batch& batch) {
    for (std::size_t i = 0; i < batch.num_texts; ++i) {
      const chameleon_text& text = batch.texts[i];
      if (text.text != nullptr) {
        strings.emplace_back(text.text, text.text_size);
      } else {
        ids.emplace_back(text.token_ids, text.token_ids + text.num_token_ids);
      }
    }
    if (!strings.empty() && !ids.empty()) throw InputError("the batch mixes texts and token id lists: pass one kind");
    if (batch.mode != nullptr) adapt.mode = parse_mode(batch.mode);
    if (batch.tenants != nullptr) adapt.tenants.emplace(batch.tenants, batch.tenants + batch.num_texts);
    if (batch.adapters != nullptr) {
      adapt.adapters.emplace();
      for (const char* name : std::span(batch.adapters, batch.num_texts)) {
        adapt.adapters->push_back(name == nullptr ? Blend() : Blend::parse(name));
      }
    }
    if (batch.conditioning != nullptr) {
      const std::span values(batch.conditioning, batch.num_texts * batch.conditioning_size);
      adapt.conditioning = Matrix{batch.num_texts, batch.conditioning_size, values};
    }
    if (batch.adapt_tokens != 0) adapt.adapt_tokens = batch.adapt_tokens;
    if (batch.adapt_text != nullptr) {
      std::vector<std::string> each(batch.adapt_text, batch.adapt_text + batch.num_adapt_text);
      if (each.size() == 1) {
        adapt.adapt_text = std::move(each.front());
      } else {
        adapt.adapt_text = std::move(each);
      }
    }
    if (batch.factors == nullptr) return;
    adapt.factors.emplace();
    for (const chameleon_factor& factor : std::span(batch.factors, batch.num_factors)) {
      const std::span values(factor.data, factor.rows * factor.columns);
      if (!adapt.factors->emplace(factor.name, Matrix{factor.rows, factor.columns, values}).second) {
        throw FactorsError(std::string("factors have '") + factor.name + "' twice");
      }
    }
  }

  [[nodiscard]] Texts texts() const {
    if (ids.empty()) return std::span(strings);
    return std::span(ids);
  }
};

Sampling read(const chameleon_sampling& given) {
  Sampling sampling{.temperature = given.temperature, .top_k = given.top_k, .seed = given.seed};
  if (given.top_p != 0) sampling.top_p = given.top_p;
  if (given.repetition_penalty != 0) sampling.repetition_penalty = given.repetition_penalty;
  sampling.stop_token_ids.assign(given.stop_token_ids, given.stop_token_ids + given.num_stop_token_ids);
  sampling.stop.assign(given.stop, given.stop + given.num_stop);
  sampling.presence_penalty = given.presence_penalty;
  sampling.frequency_penalty = given.frequency_penalty;
  for (std::size_t i = 0; i < given.num_logit_bias; ++i) {
    sampling.logit_bias[given.logit_bias_token_ids[i]] = given.logit_bias_values[i];
  }
  sampling.ignore_eos = given.ignore_eos != 0;
  if (given.logprobs != 0) sampling.logprobs = given.num_top_logprobs;
  return sampling;
}

/// One for all prompts, or one for each.
PerPrompt<Sampling> read_all(const chameleon_sampling* sampling, size_t num_samplings) {
  std::vector<Sampling> samplings;
  for (size_t i = 0; i < num_samplings; ++i) samplings.push_back(read(sampling[i]));
  if (num_samplings == 0) return Sampling{};
  if (num_samplings == 1) return samplings.front();
  return samplings;
}

OnError read_errors(const char* given) {
  const std::string_view word = given == nullptr ? "raise" : given;
  if (word == "raise") return OnError::raise;
  if (word == "row") return OnError::row;
  throw InputError("errors must be one of raise, row, got '" + std::string(word.substr(0, 40)) + "'");
}

const chameleon_token_logprob* as_c(std::span<const TokenLogprob> logprobs) {
  return reinterpret_cast<const chameleon_token_logprob*>(logprobs.data());
}

chameleon_token as_c(const Token& token) {
  return {token.row,
          token.token_id,
          token.text.data(),
          token.text.size(),
          token.generation != nullptr,
          token.logprob.value_or(0),
          as_c(token.top_logprobs),
          token.top_logprobs.size()};
}

Generate read(const chameleon_generate_options& given) {
  Generate generate{.sampling = read_all(given.sampling, given.num_samplings),
                    .prompt_lookup_num_tokens = given.prompt_lookup_num_tokens,
                    .cache_salt = given.cache_salt == nullptr ? "" : given.cache_salt,
                    .cache_generated = given.exact_cache == 0};
  if (given.max_new_tokens != 0) generate.max_new_tokens = given.max_new_tokens;
  if (given.n != 0) generate.n = given.n;
  if (given.deadline_seconds != 0) generate.deadline = Seconds(given.deadline_seconds);
  return generate;
}

Tenant tenant_of(const chameleon_generate_options& given) {
  if (given.tenant == nullptr) return {};
  const auto [name, weight, rows, max_waiting, tokens_per_minute] = *given.tenant;
  const auto limit = [](std::size_t number) { return number == 0 ? std::nullopt : std::optional(number); };
  return {name == nullptr ? "" : name, weight == 0 ? 1 : weight, limit(rows), limit(max_waiting),
          limit(tokens_per_minute)};
}

OnToken callback_of(const chameleon_generate_options& given) {
  if (given.on_token == nullptr) return {};
  return [call = given.on_token, user = given.user](const Token& token) {
    const chameleon_token seen = as_c(token);
    return call(&seen, user) != 0;
  };
}

void tell(const chameleon_engine_options& options, const FinishedRow& row) {
  std::vector<const char*> adapters;
  for (const std::string& name : row.adapters) adapters.push_back(name.c_str());
  const auto seconds = [](const std::optional<Seconds>& time) { return time ? time->count() : -1; };
  const chameleon_finished_row seen{to_string(row.mode).data(),
                                    row.cluster_id,
                                    to_string(row.finish_reason).data(),
                                    row.prompt_tokens,
                                    row.new_tokens,
                                    row.seconds.count(),
                                    seconds(row.queued),
                                    seconds(row.first_token),
                                    adapters.data(),
                                    adapters.size(),
                                    row.tenant.c_str()};
  options.on_finished(&seen, options.user);
}

/// A copy that C can free.
template <class T>
T* copy_out(const T* values, std::size_t count) {
  auto* memory = static_cast<T*>(std::malloc(count * sizeof(T) + 1));  // + 1: malloc(0) may give NULL
  if (memory == nullptr) throw std::bad_alloc();
  if (count > 0) std::memcpy(memory, values, count * sizeof(T));
  return memory;
}

}  // namespace

const char* chameleon_error_code(const chameleon_error* error) { return error->code.c_str(); }
const char* chameleon_error_message(const chameleon_error* error) { return error->message.c_str(); }
void chameleon_error_free(chameleon_error* error) {
  if (error != &out_of_memory) delete error;
}

chameleon_error* chameleon_load(const char* path, const chameleon_load_options* options, chameleon_runtime** runtime) {
  return guarded([&] {
    LoadOptions load;
    if (options != nullptr) {
      if (options->provider != nullptr) load.provider = options->provider;
      if (options->mode != nullptr) load.mode = parse_mode(options->mode);
      if (options->threads != 0) load.threads = options->threads;
      load.map_weights = options->map_weights != 0;
      if (options->trusted_keys != nullptr) {
        load.trusted_keys.emplace(options->trusted_keys, options->trusted_keys + options->num_trusted_keys);
      }
      if (options->max_adapter_bytes != 0) load.max_adapter_bytes = options->max_adapter_bytes;
    }
    *runtime = new chameleon_runtime{Runtime(required(path, "path"), load)};
  });
}
void chameleon_runtime_free(chameleon_runtime* runtime) { delete runtime; }
chameleon_error* chameleon_load_adapter(chameleon_runtime* runtime, const char* name, const char* path) {
  return guarded([&] { runtime->value.load_adapter(required(name, "name"), required(path, "path")); });
}
chameleon_error* chameleon_replace_adapter(chameleon_runtime* runtime, const char* name, const char* path) {
  return guarded([&] { runtime->value.load_adapter(required(name, "name"), required(path, "path"), true); });
}
chameleon_error* chameleon_unload_adapter(chameleon_runtime* runtime, const char* name) {
  return guarded([&] { runtime->value.unload_adapter(required(name, "name")); });
}
chameleon_error* chameleon_list_adapters(const chameleon_runtime* runtime, chameleon_adapters** adapters) {
  return guarded([&] {
    auto found = std::make_unique<chameleon_adapters>(chameleon_adapters{runtime->value.adapters(), {}});
    for (const AdapterInfo& adapter : found->value) {
      auto& targets = found->targets.emplace_back();
      for (const std::string& target : adapter.targets) targets.push_back(target.c_str());
    }
    *adapters = found.release();
  });
}
size_t chameleon_adapters_count(const chameleon_adapters* adapters) { return adapters->value.size(); }
chameleon_adapter_info chameleon_adapters_at(const chameleon_adapters* adapters, size_t index) {
  const AdapterInfo& adapter = adapters->value[index];
  const std::vector<const char*>& targets = adapters->targets[index];
  return {adapter.name.c_str(), adapter.rank, targets.data(),
          targets.size(),       adapter.size, adapter.digest ? adapter.digest->c_str() : nullptr,
          adapter.uses};
}
void chameleon_adapters_free(chameleon_adapters* adapters) { delete adapters; }
int64_t chameleon_vocab_size(const chameleon_runtime* runtime) { return runtime->value.manifest().model.vocab_size; }
int64_t chameleon_hidden_size(const chameleon_runtime* runtime) { return runtime->value.manifest().model.hidden_size; }
int64_t chameleon_conditioning_size(const chameleon_runtime* runtime) {
  return runtime->value.manifest().adaptation.conditioning_size;
}

chameleon_error* chameleon_adapt(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                 chameleon_adaptation** adaptation) {
  return guarded([&] {
    const Batch given(*batch);
    *adaptation = new chameleon_adaptation{runtime->value.adapt(given.texts(), given.adapt)};
  });
}
size_t chameleon_adaptation_num_factor_sets(const chameleon_adaptation* adaptation) {
  return static_cast<size_t>(adaptation->value.factors.sets.count);
}
const float* chameleon_adaptation_embeddings(const chameleon_adaptation* adaptation) {
  return adaptation->value.embeddings.data();
}
const int64_t* chameleon_adaptation_cluster_ids(const chameleon_adaptation* adaptation) {
  return adaptation->value.cluster_ids.data();
}
const int64_t* chameleon_adaptation_factor_ids(const chameleon_adaptation* adaptation) {
  return adaptation->value.factors.factor_ids.data();
}
size_t chameleon_adaptation_num_factors(const chameleon_adaptation* adaptation) {
  return adaptation->value.factors.sets.tensors.size();
}
chameleon_factor chameleon_adaptation_factor(const chameleon_adaptation* adaptation, size_t index) {
  const FactorSets& sets = adaptation->value.factors.sets;
  const auto& [name, values] = *std::next(sets.tensors.begin(), static_cast<std::ptrdiff_t>(index));
  const auto rank = static_cast<size_t>(sets.rank), matrices = rank * static_cast<size_t>(sets.count);
  return {name.c_str(), values.data(), rank, values.size() / matrices};
}
void chameleon_adaptation_free(chameleon_adaptation* adaptation) { delete adaptation; }

chameleon_error* chameleon_score(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                 chameleon_scores** scores) {
  return guarded([&] {
    const Batch given(*batch);
    *scores = new chameleon_scores{runtime->value.score(given.texts(), given.adapt)};
  });
}
const int64_t* chameleon_score_token_ids(const chameleon_scores* scores, size_t row, size_t* count) {
  *count = scores->value[row].token_ids.size();
  return scores->value[row].token_ids.data();
}
const float* chameleon_score_token_logprobs(const chameleon_scores* scores, size_t row, size_t* count) {
  *count = scores->value[row].token_logprobs.size();
  return scores->value[row].token_logprobs.data();
}
int64_t chameleon_score_cluster_id(const chameleon_scores* scores, size_t row) { return scores->value[row].cluster_id; }
void chameleon_scores_free(chameleon_scores* scores) { delete scores; }

chameleon_error* chameleon_generate(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                    const chameleon_generate_options* options, chameleon_generations** generations) {
  return guarded([&] {
    const Batch given(*batch);
    const chameleon_generate_options chosen = options != nullptr ? *options : chameleon_generate_options{};
    if (chosen.tenant != nullptr) throw InputError("tenant is for chameleon_engine_submit: leave it out");
    *generations = new chameleon_generations{runtime->value.stream(given.texts(), callback_of(chosen), read(chosen),
                                                                   given.adapt, read_errors(chosen.errors))};
  });
}
const int64_t* chameleon_generation_token_ids(const chameleon_generations* generations, size_t row, size_t* count) {
  *count = generations->value[row].token_ids.size();
  return generations->value[row].token_ids.data();
}
const char* chameleon_generation_text(const chameleon_generations* generations, size_t row, size_t* size) {
  *size = generations->value[row].text.size();
  return generations->value[row].text.data();
}
int64_t chameleon_generation_cluster_id(const chameleon_generations* generations, size_t row) {
  return generations->value[row].cluster_id;
}
const char* chameleon_generation_finish_reason(const chameleon_generations* generations, size_t row) {
  return to_string(generations->value[row].finish_reason).data();
}
const float* chameleon_generation_token_logprobs(const chameleon_generations* generations, size_t row, size_t* count) {
  *count = generations->value[row].token_logprobs.size();
  return generations->value[row].token_logprobs.data();
}
const chameleon_token_logprob* chameleon_generation_top_logprobs(const chameleon_generations* generations, size_t row,
                                                                 size_t token, size_t* count) {
  const std::vector<TokenLogprob>& logprobs = generations->value[row].top_logprobs[token];
  *count = logprobs.size();
  return as_c(logprobs);
}
const char* chameleon_generation_error_code(const chameleon_generations* generations, size_t row) {
  const std::optional<Error>& error = generations->value[row].error;
  return error ? error->code() : nullptr;
}
const char* chameleon_generation_error_message(const chameleon_generations* generations, size_t row) {
  const std::optional<Error>& error = generations->value[row].error;
  return error ? error->what() : nullptr;
}
void chameleon_generations_free(chameleon_generations* generations) { delete generations; }

chameleon_error* chameleon_engine_start(const chameleon_runtime* runtime, const chameleon_engine_options* options,
                                        chameleon_engine** engine) {
  return guarded([&] {
    EngineOptions chosen;
    if (options != nullptr) {
      if (options->rows != 0) chosen.rows = options->rows;
      if (options->max_waiting != 0) chosen.max_waiting = options->max_waiting;
      if (options->prefill_tokens != 0) chosen.prefill_tokens = options->prefill_tokens;
      if (options->max_factor_sets != 0) chosen.max_factor_sets = options->max_factor_sets;
      if (options->capacity != 0) chosen.capacity = options->capacity;
      if (options->prefix_cache_bytes != 0) chosen.prefix_cache_bytes = options->prefix_cache_bytes;
      if (options->no_prefix_cache != 0) chosen.prefix_cache_bytes = 0;
      chosen.cohort_window = Seconds(options->cohort_window_ms / 1000);
      if (options->on_finished != nullptr) {
        chosen.observe = [given = *options](const Iteration& iteration) {
          for (const FinishedRow& row : iteration.finished) tell(given, row);
        };
      }
    }
    *engine = new chameleon_engine{Engine(runtime->value, std::move(chosen))};
  });
}
chameleon_stats chameleon_engine_stats(const chameleon_engine* engine) {
  const Stats stats = engine->value.stats();
  return {stats.running, stats.waiting, stats.rows, stats.cached_tokens, stats.cache_capacity, stats.factor_sets};
}
chameleon_prefix_cache_stats chameleon_engine_prefix_cache_stats(const chameleon_engine* engine, const char* salt) {
  const PrefixCacheStats stats = engine->value.prefix_cache_stats(salt);
  return {stats.tokens, stats.bytes, stats.max_bytes, stats.queries, stats.hits, stats.evictions};
}
chameleon_error* chameleon_engine_clear_prefix_cache(chameleon_engine* engine, const char* salt) {
  return guarded([&] { engine->value.clear_prefix_cache(salt); });
}
chameleon_error* chameleon_engine_close(chameleon_engine* engine, double drain_seconds) {
  return guarded([&] { engine->value.close(Seconds(drain_seconds)); });
}
void chameleon_engine_free(chameleon_engine* engine) { delete engine; }

chameleon_error* chameleon_engine_submit(chameleon_engine* engine, const chameleon_batch* batch,
                                         const chameleon_generate_options* options, chameleon_stream** stream) {
  return guarded([&] {
    const Batch given(*batch);
    const chameleon_generate_options chosen = options != nullptr ? *options : chameleon_generate_options{};
    if (chosen.errors != nullptr) throw InputError("errors is for chameleon_generate: leave it out");
    *stream = new chameleon_stream{
        engine->value.submit(given.texts(), read(chosen), given.adapt, callback_of(chosen), tenant_of(chosen))};
  });
}
int chameleon_stream_next(chameleon_stream* stream, double timeout_seconds, chameleon_token* token) {
  if (timeout_seconds >= 0 && !stream->value.wait(Seconds(timeout_seconds))) return -1;
  std::optional<Token> next = stream->value.next();
  if (!next) return 0;
  stream->token = std::move(*next);
  *token = as_c(stream->token);
  return 1;
}
void chameleon_stream_cancel(chameleon_stream* stream) { stream->value.cancel(); }
size_t chameleon_stream_cached_tokens(const chameleon_stream* stream, size_t prompt) {
  return stream->value.cached_tokens()[prompt];
}
chameleon_error* chameleon_stream_result(const chameleon_stream* stream, chameleon_generations** generations) {
  return guarded([&] { *generations = new chameleon_generations{stream->value.result()}; });
}
void chameleon_stream_free(chameleon_stream* stream) { delete stream; }

chameleon_error* chameleon_encode(const chameleon_runtime* runtime, const char* text, size_t text_size,
                                  int64_t** token_ids, size_t* count) {
  return guarded([&] {
    const TokenIds ids = runtime->value.tokenizer().encode({text, text_size});
    *token_ids = copy_out(ids.data(), ids.size());
    *count = ids.size();
  });
}
chameleon_error* chameleon_decode(const chameleon_runtime* runtime, const int64_t* token_ids, size_t count, char** text,
                                  size_t* text_size) {
  return guarded([&] {
    const std::string decoded = runtime->value.tokenizer().decode({token_ids, count});
    *text = copy_out(decoded.data(), decoded.size());
    *text_size = decoded.size();
  });
}
void chameleon_free(void* memory) { std::free(memory); }
