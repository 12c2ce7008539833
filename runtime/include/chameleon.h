/* The C interface of the chameleon runtime, for embedding in other languages.
 *
 * Every function that can fail returns a chameleon_error, or NULL on success; the caller frees it. No exception leaves
 * a function. Text is UTF-8. Many threads may use one handle at once. The caller frees a handle with the function named
 * after it; freeing NULL does nothing. Pointers that accessors return belong to the handle.
 */
#ifndef CHAMELEON_H
#define CHAMELEON_H

#include <stddef.h>
#include <stdint.h>

#include "chameleon/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct chameleon_error chameleon_error;
typedef struct chameleon_runtime chameleon_runtime;
typedef struct chameleon_adapters chameleon_adapters;
typedef struct chameleon_adaptation chameleon_adaptation;
typedef struct chameleon_scores chameleon_scores;
typedef struct chameleon_generations chameleon_generations;
typedef struct chameleon_engine chameleon_engine;
typedef struct chameleon_stream chameleon_stream;

/* The stable code, such as "input_invalid", the same as in Python. */
CHAMELEON_EXPORT const char* chameleon_error_code(const chameleon_error* error);
CHAMELEON_EXPORT const char* chameleon_error_message(const chameleon_error* error);
CHAMELEON_EXPORT void chameleon_error_free(chameleon_error* error);

typedef struct {
  const char* provider; /* "cpu", "tensorrt" in a build that has it, or "auto"; NULL is "cpu" */
  const char* mode;     /* default mode of the calls; NULL is "cohort", or "static" for a bundle of regime lora */
  int threads;          /* of ONNX Runtime, within one operator; 0 lets it choose */
  int map_weights;      /* 1 maps the weights instead of packing a copy: about half of the memory, shared between
                           processes; slower in batches, and last bits differ */
  const char* const* trusted_keys; /* PEM files of Ed25519 public keys: a bundle that none of them signed is refused
                                      with "signature_invalid"; NULL accepts any */
  size_t num_trusted_keys;
  size_t max_adapter_bytes; /* of the factors of loaded adapters that stay in memory; 0: all */
} chameleon_load_options;

CHAMELEON_EXPORT chameleon_error* chameleon_load(const char* path, const chameleon_load_options* options,
                                                 chameleon_runtime** runtime);
CHAMELEON_EXPORT void chameleon_runtime_free(chameleon_runtime* runtime);
CHAMELEON_EXPORT int64_t chameleon_vocab_size(const chameleon_runtime* runtime);
CHAMELEON_EXPORT int64_t chameleon_hidden_size(const chameleon_runtime* runtime);
/* Of a vector that the caller gives with every text; 0: texts are conditioned on embeddings. */
CHAMELEON_EXPORT int64_t chameleon_conditioning_size(const chameleon_runtime* runtime);

/* Add an adapter from a file that `adapter` wrote for this base model, or from a PEFT LoRA directory. Calls that run
 * are not affected.
 * Errors: "input_invalid" for a name that cannot be used, "adapter_invalid" for a name that is taken or what is not an
 * adapter of this bundle, "checkpoint_invalid" for a directory that is no plain LoRA, "tensor_invalid". Then nothing is
 * loaded, or replaced. */
CHAMELEON_EXPORT chameleon_error* chameleon_load_adapter(chameleon_runtime* runtime, const char* name,
                                                         const char* path);
/* The same, in the place of a loaded adapter of that name if there is one: rows that were submitted before keep its
 * factors, later ones have the new. "adapter_invalid" for the name of one of the bundle. */
CHAMELEON_EXPORT chameleon_error* chameleon_replace_adapter(chameleon_runtime* runtime, const char* name,
                                                            const char* path);
/* Forget an adapter; rows that use it keep its factors. */
CHAMELEON_EXPORT chameleon_error* chameleon_unload_adapter(chameleon_runtime* runtime, const char* name);

/* An adapter of the bundle, or one that was loaded. */
typedef struct {
  const char* name;
  int64_t rank;               /* without padding */
  const char* const* targets; /* the layers that it updates */
  size_t num_targets;
  size_t size;        /* bytes of its factors in memory */
  const char* digest; /* the SHA-256 of its file, or of a directory's configuration and tensors; NULL of the bundle's */
  size_t uses;        /* how many texts have chosen it, alone or with others */
} chameleon_adapter_info;

/* The bundle's adapters and those that were loaded, in that order, as they are now. A list outlives the runtime. */
CHAMELEON_EXPORT chameleon_error* chameleon_list_adapters(const chameleon_runtime* runtime,
                                                          chameleon_adapters** adapters);
CHAMELEON_EXPORT size_t chameleon_adapters_count(const chameleon_adapters* adapters);
CHAMELEON_EXPORT chameleon_adapter_info chameleon_adapters_at(const chameleon_adapters* adapters, size_t index);
CHAMELEON_EXPORT void chameleon_adapters_free(chameleon_adapters* adapters);

/* One text: bytes of UTF-8 in `text`, or token ids in `token_ids` where `text` is NULL. */
typedef struct {
  const char* text;
  size_t text_size;
  const int64_t* token_ids;
  size_t num_token_ids;
} chameleon_text;

/* One factor tensor, row-major: "lm_head.lora_A" has `rank` rows of in_features columns, "lm_head.lora_B" has `rank`
 * rows of out_features columns, with alpha multiplied into it. */
typedef struct {
  const char* name;
  const float* data;
  size_t rows;
  size_t columns;
} chameleon_factor;

typedef struct {
  const chameleon_text* texts;
  size_t num_texts;
  const char* mode;                /* NULL: the runtime's mode */
  const char* const* tenants;      /* mode tenant: num_texts names; else NULL */
  const chameleon_factor* factors; /* mode static: the caller's factor set, both tensors of every target; else NULL */
  size_t num_factors;
  /* mode static, which they imply: num_texts names of adapters, or weights by name such as "legal=0.7,code=0.3", NULL
   * for the base model; else NULL */
  const char* const* adapters;
  /* mode request of a bundle whose hypernetwork reads vectors of the caller: num_texts of them, each of
   * conditioning_size numbers, row-major; else NULL */
  const float* conditioning;
  size_t conditioning_size;
  size_t adapt_tokens; /* embed only this many leading tokens of every text; 0: all */
  /* mode request of a bundle with a sentence encoder, in the place of conditioning: a description of the task for all
   * texts (num_adapt_text 1), or one per text; else NULL */
  const char* const* adapt_text;
  size_t num_adapt_text;
} chameleon_batch;

CHAMELEON_EXPORT chameleon_error* chameleon_adapt(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                                  chameleon_adaptation** adaptation);
CHAMELEON_EXPORT size_t chameleon_adaptation_num_factor_sets(const chameleon_adaptation* adaptation);
CHAMELEON_EXPORT const float* chameleon_adaptation_embeddings(const chameleon_adaptation* adaptation);
CHAMELEON_EXPORT const int64_t* chameleon_adaptation_cluster_ids(const chameleon_adaptation* adaptation);
CHAMELEON_EXPORT const int64_t* chameleon_adaptation_factor_ids(const chameleon_adaptation* adaptation);
CHAMELEON_EXPORT size_t chameleon_adaptation_num_factors(const chameleon_adaptation* adaptation);
/* The factor tensor number `index` of the first factor set; the matrices of the other sets follow it in data. */
CHAMELEON_EXPORT chameleon_factor chameleon_adaptation_factor(const chameleon_adaptation* adaptation, size_t index);
CHAMELEON_EXPORT void chameleon_adaptation_free(chameleon_adaptation* adaptation);

CHAMELEON_EXPORT chameleon_error* chameleon_score(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                                  chameleon_scores** scores);
CHAMELEON_EXPORT const int64_t* chameleon_score_token_ids(const chameleon_scores* scores, size_t row, size_t* count);
CHAMELEON_EXPORT const float* chameleon_score_token_logprobs(const chameleon_scores* scores, size_t row, size_t* count);
CHAMELEON_EXPORT int64_t chameleon_score_cluster_id(const chameleon_scores* scores, size_t row);
CHAMELEON_EXPORT void chameleon_scores_free(chameleon_scores* scores);

/* The natural logarithm of a token's probability. */
typedef struct {
  int64_t token_id;
  float logprob;
} chameleon_token_logprob;

/* A zeroed struct samples greedily: zero means "off" in every field but the seed. */
typedef struct {
  double temperature;
  int64_t top_k;
  double top_p;              /* 0 keeps all */
  double repetition_penalty; /* 0 leaves the logits alone */
  uint64_t seed;
  const int64_t* stop_token_ids;
  size_t num_stop_token_ids;
  const char* const* stop;
  size_t num_stop;
  double presence_penalty;
  double frequency_penalty;
  const int64_t* logit_bias_token_ids;
  const double* logit_bias_values; /* one for each of logit_bias_token_ids */
  size_t num_logit_bias;
  int ignore_eos;
  int logprobs;         /* 1 reports the log-probability of every token */
  int num_top_logprobs; /* and with it those of 0 to 20 alternatives */
} chameleon_sampling;

typedef struct {
  size_t row;
  int64_t token_id; /* -1 if the row ended without a new token */
  const char* text; /* text_size bytes, valid during the callback or until the stream's next token */
  size_t text_size;
  int finished;
  float logprob; /* 0 without chameleon_sampling.logprobs */
  const chameleon_token_logprob* top_logprobs;
  size_t num_top_logprobs;
} chameleon_token;

/* Called for every token, after each step in the order of the rows. Return 0 to cancel this row, which then ends before
 * the next step; the other rows continue. */
typedef int (*chameleon_on_token)(const chameleon_token* token, void* user);

/* Whose rows a submit has, and what the tenant may take of an engine. Zero is the default in every field. */
typedef struct {
  const char* name;         /* whose submits all have the same weight and limits; NULL is "", one tenant too */
  int64_t weight;           /* of its share, 1 to 1,000, while several tenants wait; 1 by default */
  size_t rows;              /* of it in the batch at a time, at most; all by default */
  size_t max_waiting;       /* rows of it that may wait, at most; as many as in the engine by default */
  size_t tokens_per_minute; /* that it may use, of prompts and new ones; without limit by default */
} chameleon_tenant;

/* How to continue the prompts of one call. Zero is the default in every field. */
typedef struct {
  int64_t max_new_tokens; /* 20 by default */
  /* One for all prompts (num_samplings 1), where row i draws from random stream i, or one per prompt, where its
   * continuation k draws from stream k. NULL with num_samplings 0 samples greedily. */
  const chameleon_sampling* sampling;
  size_t num_samplings;
  size_t n;                         /* continuations per prompt; 1 by default */
  double deadline_seconds;          /* after which rows that have not ended finish as "deadline"; none by default */
  int64_t prompt_lookup_num_tokens; /* on the CPU, in fp32, while a single row is generated: draft up to this many
                                       tokens, at most 16, from the text so far; 0 is off */
  const char* cache_salt; /* an engine's prefix cache shares keys and values only among equal salts; NULL is "" */
  int exact_cache;        /* 1: take and keep no keys and values that steps wrote, which are not bitwise equal */
  const char* errors; /* of one row, whose logits are not finite or whose tokens cannot be decoded: "raise" (default)
                         fails the call, "row" ends that row alone, with finish reason "error", as an engine does */
  chameleon_on_token on_token;    /* of chameleon_engine_submit: called by the engine's thread, in place of
                                     chameleon_stream_next; must be quick */
  void* user;                     /* passed to on_token */
  const chameleon_tenant* tenant; /* of chameleon_engine_submit: whose share of the engine the rows take, not those of
                                     mode tenant; NULL is the tenant without a name */
} chameleon_generate_options;

/* Row i * n + k is continuation k of prompt i.
 * options: NULL for the defaults */
CHAMELEON_EXPORT chameleon_error* chameleon_generate(const chameleon_runtime* runtime, const chameleon_batch* batch,
                                                     const chameleon_generate_options* options,
                                                     chameleon_generations** generations);
CHAMELEON_EXPORT const int64_t* chameleon_generation_token_ids(const chameleon_generations* generations, size_t row,
                                                               size_t* count);
CHAMELEON_EXPORT const char* chameleon_generation_text(const chameleon_generations* generations, size_t row,
                                                       size_t* size);
CHAMELEON_EXPORT int64_t chameleon_generation_cluster_id(const chameleon_generations* generations, size_t row);
/* "stop", "length", "cancelled", "deadline" or "error". */
CHAMELEON_EXPORT const char* chameleon_generation_finish_reason(const chameleon_generations* generations, size_t row);
/* One for each token id; none without chameleon_sampling.logprobs. */
CHAMELEON_EXPORT const float* chameleon_generation_token_logprobs(const chameleon_generations* generations, size_t row,
                                                                  size_t* count);
/* The most probable tokens where token number `token` was chosen, highest first. */
CHAMELEON_EXPORT const chameleon_token_logprob* chameleon_generation_top_logprobs(
    const chameleon_generations* generations, size_t row, size_t token, size_t* count);
/* What ended a row whose finish reason is "error"; NULL for other rows. */
CHAMELEON_EXPORT const char* chameleon_generation_error_code(const chameleon_generations* generations, size_t row);
CHAMELEON_EXPORT const char* chameleon_generation_error_message(const chameleon_generations* generations, size_t row);
CHAMELEON_EXPORT void chameleon_generations_free(chameleon_generations* generations);

/* A row that ended. Its pointers are valid during the callback. */
typedef struct {
  const char* mode;
  int64_t cluster_id;
  const char* finish_reason; /* as of chameleon_generation_finish_reason */
  size_t prompt_tokens, new_tokens;
  double seconds;              /* from its submit to its end */
  double queued, first_token;  /* seconds to its admission, and to its first token; -1 without that */
  const char* const* adapters; /* names of its adapters, of all where it blends several */
  size_t num_adapters;
  const char* tenant; /* the name of its tenant, or "" */
} chameleon_finished_row;

typedef void (*chameleon_on_finished)(const chameleon_finished_row* row, void* user);

/* Zero is the default in every field. */
typedef struct {
  size_t rows;               /* places in the batch; 8 by default */
  size_t max_waiting;        /* rows that may wait for a place; 256 by default */
  size_t prefill_tokens;     /* prompt tokens prefilled between two steps of the running rows; 256 by default */
  size_t max_factor_sets;    /* different factor sets in the batch at a time; as many as rows by default */
  double cohort_window_ms;   /* how long a submit waits for others that join its cohort */
  size_t capacity;           /* tokens per row that the key-value cache holds; the model's positions by default */
  size_t prefix_cache_bytes; /* of keys and values that later prompts may begin with; a tenth of the free memory by
                                default */
  int no_prefix_cache;       /* 1: keep none */
  chameleon_on_finished on_finished; /* called by the engine's thread for every row that ended, after its last token;
                                        must be quick */
  void* user;                        /* passed to on_finished */
} chameleon_engine_options;

typedef struct {
  size_t running, waiting; /* rows in the batch, and rows that wait for a place */
  size_t rows;             /* places in the batch */
  size_t cached_tokens;    /* tokens in the key-value cache, of cache_capacity */
  size_t cache_capacity;
  size_t factor_sets; /* resident factor sets */
} chameleon_stats;

typedef struct {
  size_t tokens, bytes, max_bytes; /* whose keys and values are cached; bytes that these take, of max_bytes */
  size_t queries, hits;            /* prompt tokens that were looked for, and those that were found and used */
  size_t evictions;                /* tokens that had to make room for others */
} chameleon_prefix_cache_stats;

/* Start an engine: one thread generates for many callers at once. The runtime must outlive it. Freeing it closes it as
 * chameleon_engine_close(engine, 30) does. */
CHAMELEON_EXPORT chameleon_error* chameleon_engine_start(const chameleon_runtime* runtime,
                                                         const chameleon_engine_options* options,
                                                         chameleon_engine** engine);
CHAMELEON_EXPORT chameleon_stats chameleon_engine_stats(const chameleon_engine* engine);
/* The state of the prefix cache, with the tokens and bytes of salts that begin with `salt`. */
CHAMELEON_EXPORT chameleon_prefix_cache_stats chameleon_engine_prefix_cache_stats(const chameleon_engine* engine,
                                                                                  const char* salt);
/* Forget the keys and values of requests whose salt begins with `salt`. */
CHAMELEON_EXPORT chameleon_error* chameleon_engine_clear_prefix_cache(chameleon_engine* engine, const char* salt);
/* Accept no new request, finish the accepted ones, and end the thread. After drain_seconds the rest is cancelled. */
CHAMELEON_EXPORT chameleon_error* chameleon_engine_close(chameleon_engine* engine, double drain_seconds);
CHAMELEON_EXPORT void chameleon_engine_free(chameleon_engine* engine);

/* Queue every prompt and return at once. The arguments are copied; `errors` must be NULL.
 * options: NULL for the defaults
 * Errors besides those of chameleon_generate: "queue_full", "rate_limited" and "closed". */
CHAMELEON_EXPORT chameleon_error* chameleon_engine_submit(chameleon_engine* engine, const chameleon_batch* batch,
                                                          const chameleon_generate_options* options,
                                                          chameleon_stream** stream);
/* Wait for the next token, at most timeout_seconds (negative: without limit). Returns 1 with a token, 0 after the last
 * token of the last row, and -1 after the timeout. One thread at a time reads a stream. */
CHAMELEON_EXPORT int chameleon_stream_next(chameleon_stream* stream, double timeout_seconds, chameleon_token* token);
/* End all rows within one iteration of the engine. From any thread. */
CHAMELEON_EXPORT void chameleon_stream_cancel(chameleon_stream* stream);
/* Tokens of a prompt that were found in the prefix cache, known with its first token. */
CHAMELEON_EXPORT size_t chameleon_stream_cached_tokens(const chameleon_stream* stream, size_t prompt);
/* Wait until every row has ended. */
CHAMELEON_EXPORT chameleon_error* chameleon_stream_result(const chameleon_stream* stream,
                                                          chameleon_generations** generations);
/* Does not cancel: the rows run to their end. */
CHAMELEON_EXPORT void chameleon_stream_free(chameleon_stream* stream);

/* Token ids of one text with the special tokens that tokenizer.json puts around it, without the checks of a batch, and
 * the text of token ids. The caller frees the results with chameleon_free. */
CHAMELEON_EXPORT chameleon_error* chameleon_encode(const chameleon_runtime* runtime, const char* text, size_t text_size,
                                                   int64_t** token_ids, size_t* count);
CHAMELEON_EXPORT chameleon_error* chameleon_decode(const chameleon_runtime* runtime, const int64_t* token_ids,
                                                   size_t count, char** text, size_t* text_size);
CHAMELEON_EXPORT void chameleon_free(void* memory);

#ifdef __cplusplus
}
#endif

#endif
