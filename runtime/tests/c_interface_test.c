/* The C interface from C: it must compile as C and report errors as values. Prints nothing when all is well. */
#include <stdio.h>
#include <string.h>

#include "chameleon.h"

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) {                                       \
      fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      return 1;                                               \
    }                                                         \
  } while (0)

static int cancel_after_two(const chameleon_token* token, void* user) { return token->finished || ++*(int*)user < 2; }

#define REFUSED(call, code)                                                     \
  do {                                                                          \
    chameleon_error* refused = call;                                            \
    CHECK(refused != NULL && strcmp(chameleon_error_code(refused), code) == 0); \
    chameleon_error_free(refused);                                              \
  } while (0)

/* Where a submit says whose it is: what the tenant may take, and what no tenant can have. */
static int test_tenants(chameleon_runtime* runtime, chameleon_engine* engine, const chameleon_batch* batch) {
  chameleon_generations* generations = NULL;
  chameleon_stream* stream = NULL;
  size_t count = 0;
  chameleon_tenant tenant = {.name = "acme", .weight = 3, .rows = 1, .max_waiting = 1, .tokens_per_minute = 1000};
  chameleon_generate_options options = {.max_new_tokens = 4, .n = 2, .tenant = &tenant};
  REFUSED(chameleon_generate(runtime, batch, &options, &generations), "input_invalid"); /* it is of an engine */

  const chameleon_generate_options plain = {.max_new_tokens = 4, .n = 2};
  CHECK(chameleon_generate(runtime, batch, &plain, &generations) == NULL);
  const int64_t last = chameleon_generation_token_ids(generations, 1, &count)[3];
  chameleon_generations_free(generations);
  chameleon_tenant unlimited = {.name = NULL}; /* zero is the default in every field */
  const chameleon_tenant* const tenants[] = {&tenant, &unlimited};
  for (int i = 0; i < 2; ++i) {
    options.tenant = tenants[i];
    CHECK(chameleon_engine_submit(engine, batch, &options, &stream) == NULL);
    CHECK(chameleon_stream_result(stream, &generations) == NULL);
    CHECK(chameleon_generation_token_ids(generations, 1, &count)[3] == last && count == 4);
    chameleon_generations_free(generations);
    chameleon_stream_free(stream);
  }

  options.n = 3; /* one in the batch and one that waits are two */
  options.tenant = &tenant;
  REFUSED(chameleon_engine_submit(engine, batch, &options, &stream), "queue_full");
  tenant.max_waiting = 2;
  CHECK(chameleon_engine_submit(engine, batch, &options, &stream) == NULL);
  CHECK(chameleon_stream_result(stream, &generations) == NULL);
  chameleon_generations_free(generations);
  chameleon_stream_free(stream);

  const chameleon_tenant wrong[] = {
      {.weight = 1001}, {.weight = -1}, {.rows = SIZE_MAX}, {.max_waiting = SIZE_MAX}, {.tokens_per_minute = SIZE_MAX}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    options.tenant = &wrong[i];
    REFUSED(chameleon_engine_submit(engine, batch, &options, &stream), "input_invalid");
  }

  char name[] = "small"; /* copied, like all that a submit is given */
  chameleon_tenant small = {.name = name, .tokens_per_minute = 1};
  options.n = 1;
  options.tenant = &small;
  CHECK(chameleon_engine_submit(engine, batch, &options, &stream) == NULL); /* the first takes it below zero */
  name[0] = '!';
  CHECK(chameleon_stream_result(stream, &generations) == NULL);
  chameleon_generations_free(generations);
  chameleon_stream_free(stream);
  name[0] = 's';
  REFUSED(chameleon_engine_submit(engine, batch, &options, &stream), "rate_limited");
  name[0] = '!'; /* another tenant has its own */
  CHECK(chameleon_engine_submit(engine, batch, &options, &stream) == NULL);
  chameleon_stream_free(stream);
  return 0;
}

/* Of a bundle that takes no adapters, and of what is no name and no file. */
static int test_adapters(chameleon_runtime* runtime) {
  const char* const file = "/nowhere/legal.safetensors";
  REFUSED(chameleon_load_adapter(runtime, "legal", file), "adapter_invalid");
  REFUSED(chameleon_replace_adapter(runtime, "legal", file), "adapter_invalid");
  REFUSED(chameleon_unload_adapter(runtime, "legal"), "adapter_invalid");
  REFUSED(chameleon_replace_adapter(runtime, "a/b", file), "input_invalid");
  REFUSED(chameleon_load_adapter(runtime, NULL, file), "input_invalid");
  REFUSED(chameleon_load_adapter(runtime, "legal", NULL), "input_invalid");
  REFUSED(chameleon_replace_adapter(runtime, NULL, file), "input_invalid");
  REFUSED(chameleon_replace_adapter(runtime, "legal", NULL), "input_invalid");
  REFUSED(chameleon_unload_adapter(runtime, NULL), "input_invalid");
  chameleon_adapters* adapters = NULL;
  CHECK(chameleon_list_adapters(runtime, &adapters) == NULL && chameleon_adapters_count(adapters) == 0);
  chameleon_adapters_free(adapters);
  chameleon_adapters_free(NULL);
  return 0;
}

int main(int argc, char** argv) {
  chameleon_runtime* runtime = NULL;
  CHECK(argc == 2);

  REFUSED(chameleon_load(NULL, NULL, &runtime), "input_invalid");
  chameleon_error* error = chameleon_load("/nowhere", NULL, &runtime);
  CHECK(error != NULL && runtime == NULL);
  CHECK(strcmp(chameleon_error_code(error), "bundle_not_found") == 0);
  CHECK(strstr(chameleon_error_message(error), "/nowhere") != NULL);
  chameleon_error_free(error);
  chameleon_error_free(NULL);

  const char* const keys[] = {"/nowhere/key.pub"};
  const chameleon_load_options strict = {"cpu", "centroid", 1, 1, keys, 1, 0};
  error = chameleon_load(argv[1], &strict, &runtime);
  CHECK(error != NULL && runtime == NULL);
  CHECK(strcmp(chameleon_error_code(error), "input_invalid") == 0);
  chameleon_error_free(error);

  const chameleon_load_options options = {"cpu", "centroid", 1, 1, NULL, 0, 0};
  CHECK(chameleon_load(argv[1], &options, &runtime) == NULL);
  CHECK(chameleon_vocab_size(runtime) == 320 && chameleon_hidden_size(runtime) == 16);
  CHECK(chameleon_conditioning_size(runtime) == 0);

  const int64_t ids[] = {5, 6, 7};
  chameleon_text texts[] = {{"The river", 9, NULL, 0}, {NULL, 0, ids, 3}};
  chameleon_batch batch = {texts, 2, NULL, NULL, NULL, 0, NULL, NULL, 0, 0};
  chameleon_generations* generations = NULL;
  const chameleon_generate_options four = {.max_new_tokens = 4};
  error = chameleon_generate(runtime, &batch, &four, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0); /* mixed kinds */
  chameleon_error_free(error);

  batch.num_texts = 1;
  CHECK(chameleon_generate(runtime, &batch, &four, &generations) == NULL);
  size_t count = 0;
  CHECK(chameleon_generation_token_ids(generations, 0, &count) != NULL && count == 4);
  CHECK(strcmp(chameleon_generation_finish_reason(generations, 0), "length") == 0);
  CHECK(chameleon_generation_cluster_id(generations, 0) >= 0);
  chameleon_generations_free(generations);

  const float vector[] = {1, 2, 3};
  batch.conditioning = vector;
  batch.conditioning_size = 3;
  error = chameleon_generate(runtime, &batch, &four, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "mode_unavailable") == 0);
  CHECK(strstr(chameleon_error_message(error), "takes no conditioning") != NULL);
  chameleon_error_free(error);
  batch.conditioning = NULL;

  const char* description = "answer like a lawyer";
  batch.adapt_text = &description;
  batch.num_adapt_text = 1;
  error = chameleon_generate(runtime, &batch, &four, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "mode_unavailable") == 0);
  CHECK(strstr(chameleon_error_message(error), "exported with --encoder") != NULL);
  chameleon_error_free(error);
  batch.adapt_text = NULL;

  const int64_t biased = 7;
  double bias = 101;
  const chameleon_sampling reporting = {.logit_bias_token_ids = &biased,
                                        .logit_bias_values = &bias,
                                        .num_logit_bias = 1,
                                        .logprobs = 1,
                                        .num_top_logprobs = 3};
  const chameleon_generate_options reported = {.max_new_tokens = 4, .sampling = &reporting, .num_samplings = 1};
  error = chameleon_generate(runtime, &batch, &reported, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0);
  chameleon_error_free(error);
  bias = 100;
  CHECK(chameleon_generate(runtime, &batch, &reported, &generations) == NULL);
  CHECK(chameleon_generation_token_logprobs(generations, 0, &count)[3] <= 0 && count == 4);
  const chameleon_token_logprob* top = chameleon_generation_top_logprobs(generations, 0, 3, &count);
  CHECK(count == 3 && top[0].logprob >= top[1].logprob && top[1].logprob >= top[2].logprob);
  chameleon_generations_free(generations);

  int calls = 0;
  const chameleon_generate_options cancelled = {.on_token = cancel_after_two, .user = &calls};
  CHECK(chameleon_generate(runtime, &batch, &cancelled, &generations) == NULL);
  CHECK(calls == 2 && strcmp(chameleon_generation_finish_reason(generations, 0), "cancelled") == 0);
  chameleon_generations_free(generations);

  const chameleon_generate_options drafted = {.max_new_tokens = 4, .prompt_lookup_num_tokens = 17};
  error = chameleon_generate(runtime, &batch, &drafted, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0); /* at most 16 */
  chameleon_error_free(error);
  const chameleon_generate_options ignoring = {.errors = "ignore"};
  error = chameleon_generate(runtime, &batch, &ignoring, &generations);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0);
  chameleon_error_free(error);
  CHECK(test_adapters(runtime) == 0);

  chameleon_engine* engine = NULL;
  const chameleon_engine_options few = {.prefill_tokens = 1};
  error = chameleon_engine_start(runtime, &few, &engine);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0);
  chameleon_error_free(error);
  CHECK(chameleon_engine_start(runtime, NULL, &engine) == NULL);
  CHECK(chameleon_engine_stats(engine).rows == 8 && chameleon_engine_stats(engine).running == 0);
  chameleon_stream* stream = NULL;
  const chameleon_generate_options twice = {.max_new_tokens = 4, .n = 2};
  CHECK(chameleon_engine_submit(engine, &batch, &twice, &stream) == NULL);
  chameleon_token token;
  int tokens = 0, ends = 0, found = 0;
  while ((found = chameleon_stream_next(stream, -1, &token)) == 1) {
    ++tokens;
    ends += token.finished;
  }
  CHECK(found == 0 && tokens == 8 && ends == 2);
  CHECK(chameleon_stream_result(stream, &generations) == NULL);
  CHECK(chameleon_generation_token_ids(generations, 1, &count)[3] == token.token_id && count == 4);
  CHECK(chameleon_generation_error_code(generations, 0) == NULL);
  chameleon_generations_free(generations);
  CHECK(chameleon_stream_cached_tokens(stream, 0) == 0);
  chameleon_stream_free(stream);
  CHECK(chameleon_engine_prefix_cache_stats(engine, "").queries > 0);
  CHECK(chameleon_engine_clear_prefix_cache(engine, "") == NULL);
  CHECK(chameleon_engine_prefix_cache_stats(engine, "").tokens == 0);
  chameleon_engine* uncached = NULL;
  const chameleon_engine_options without = {.no_prefix_cache = 1};
  CHECK(chameleon_engine_start(runtime, &without, &uncached) == NULL);
  CHECK(chameleon_engine_prefix_cache_stats(uncached, "").max_bytes == 0);
  chameleon_engine_free(uncached);

  const chameleon_generate_options hurried = {.max_new_tokens = 4, .deadline_seconds = 1e-9};
  CHECK(chameleon_generate(runtime, &batch, &twice, &generations) == NULL);
  CHECK(chameleon_generation_token_ids(generations, 1, &count)[3] == token.token_id && count == 4);
  chameleon_generations_free(generations);
  error = chameleon_engine_submit(engine, &batch, &ignoring, &stream);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "input_invalid") == 0);
  chameleon_error_free(error);
  CHECK(test_tenants(runtime, engine, &batch) == 0);
  calls = 0;
  CHECK(chameleon_engine_submit(engine, &batch, &cancelled, &stream) == NULL);
  CHECK(chameleon_stream_next(stream, -1, &token) == 0);
  CHECK(chameleon_stream_result(stream, &generations) == NULL && calls == 2);
  CHECK(strcmp(chameleon_generation_finish_reason(generations, 0), "cancelled") == 0);
  chameleon_generations_free(generations);
  chameleon_stream_free(stream);
  CHECK(chameleon_engine_submit(engine, &batch, &hurried, &stream) == NULL);
  CHECK(chameleon_stream_next(stream, 60, &token) == 1 && token.token_id == -1 && token.finished);
  chameleon_stream_cancel(stream);
  CHECK(chameleon_stream_result(stream, &generations) == NULL);
  CHECK(strcmp(chameleon_generation_finish_reason(generations, 0), "deadline") == 0);
  chameleon_generations_free(generations);
  chameleon_stream_free(stream);

  CHECK(chameleon_engine_close(engine, 30) == NULL);
  error = chameleon_engine_submit(engine, &batch, NULL, &stream);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "closed") == 0);
  chameleon_error_free(error);
  chameleon_engine_free(engine);

  chameleon_scores* scores = NULL;
  CHECK(chameleon_score(runtime, &batch, &scores) == NULL);
  size_t num_logprobs = 0;
  chameleon_score_token_ids(scores, 0, &count);
  CHECK(chameleon_score_token_logprobs(scores, 0, &num_logprobs)[0] < 0 && num_logprobs + 1 == count);
  chameleon_scores_free(scores);

  float lora_A[16] = {0}, lora_B[320] = {0};
  const chameleon_factor factors[] = {{"lm_head.lora_A", lora_A, 1, 16}, {"lm_head.lora_B", lora_B, 1, 320}};
  batch.mode = "static";
  batch.factors = factors;
  batch.num_factors = 2;
  chameleon_adaptation* adaptation = NULL;
  CHECK(chameleon_adapt(runtime, &batch, &adaptation) == NULL);
  CHECK(chameleon_adaptation_num_factor_sets(adaptation) == 1 && chameleon_adaptation_num_factors(adaptation) == 2);
  const chameleon_factor second = chameleon_adaptation_factor(adaptation, 1);
  CHECK(strcmp(second.name, "lm_head.lora_B") == 0 && second.rows == 1 && second.columns == 320);
  CHECK(memcmp(second.data, lora_B, sizeof lora_B) == 0);
  chameleon_adaptation_free(adaptation);
  batch.num_factors = 1;
  error = chameleon_adapt(runtime, &batch, &adaptation);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "factors_invalid") == 0);
  chameleon_error_free(error);

  batch.factors = NULL;
  batch.mode = "nonsense";
  error = chameleon_score(runtime, &batch, &scores);
  CHECK(error != NULL && strcmp(chameleon_error_code(error), "mode_unavailable") == 0);
  chameleon_error_free(error);

  int64_t* encoded = NULL;
  char* text = NULL;
  CHECK(chameleon_encode(runtime, "The river", 9, &encoded, &count) == NULL && count > 0);
  size_t size = 0;
  CHECK(chameleon_decode(runtime, encoded, count, &text, &size) == NULL);
  CHECK(size == 9 && memcmp(text, "The river", 9) == 0);
  chameleon_free(encoded);
  chameleon_free(text);
  chameleon_runtime_free(runtime);
  return 0;
}
