// Any schedule of requests on the engine without its thread: submits, cancels and iterations as the bytes say. Every
// accepted row ends, its tokens and text are what it was streamed, and nothing stays in the batch.

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdlib>

#include "chameleon/error.h"
#include "decode/shared_cache.h"
#include "engine/loop.h"
#include "engine/submission.h"

namespace {

using namespace chameleon;

void require(bool condition) {
  if (!condition) std::abort();
}

Sampling any_sampling(FuzzedDataProvider& data) {
  return {.temperature = data.ConsumeIntegralInRange(0, 3) * 0.7,
          .top_k = data.ConsumeIntegralInRange(0, 5),
          .repetition_penalty = data.ConsumeBool() ? 1 : 1.3,
          .seed = data.ConsumeIntegral<std::uint8_t>(),
          .stop_token_ids = {data.ConsumeIntegral<std::uint8_t>()},
          .stop = {data.ConsumeBool() ? "e" : "ing"},
          .ignore_eos = data.ConsumeBool()};
}

/// How a submit is adapted and generated.
struct Options {
  Adapt adapt{};
  Generate generate{};
};

Options any_options(FuzzedDataProvider& data, std::size_t prompts) {
  Options options;
  auto& [adapt, generate] = options;
  adapt.mode =
      data.PickValueInArray({Mode::none, Mode::static_, Mode::centroid, Mode::request, Mode::cohort, Mode::tenant});
  generate.max_new_tokens = data.ConsumeIntegralInRange<std::int64_t>(0, 12);
  generate.sampling = any_sampling(data);
  generate.n = data.ConsumeIntegralInRange<std::size_t>(0, 4);
  if (data.ConsumeBool()) adapt.tenants.emplace(prompts, data.ConsumeRandomLengthString(2));
  if (data.ConsumeBool()) generate.deadline = Seconds(data.ConsumeIntegralInRange(-1, 1) * 1e-9);
  if (data.ConsumeBool()) adapt.adapt_tokens = data.ConsumeIntegralInRange<std::size_t>(0, 3);
  // It takes no bytes of its own, so that the corpus keeps its meaning.
  generate.prompt_lookup_num_tokens = static_cast<std::int64_t>(generate.n) * 4;
  return options;
}

std::vector<TokenIds> any_prompts(FuzzedDataProvider& data) {
  std::vector<TokenIds> prompts(data.ConsumeIntegralInRange<std::size_t>(0, 3));
  for (TokenIds& ids : prompts) {
    ids.resize(data.ConsumeIntegralInRange<std::size_t>(0, 30));
    for (std::int64_t& id : ids) id = data.ConsumeIntegralInRange<std::int64_t>(-1, 320);
  }
  return prompts;
}

void check_ended(const Stream& stream) {
  require(stream.done());
  std::vector<TokenIds> token_ids(stream.prompts().size() * stream.n());
  std::vector<std::string> texts(token_ids.size());
  while (const auto token = stream.next()) {
    if (token->token_id >= 0) token_ids[token->row].push_back(token->token_id);
    texts[token->row] += token->text;
  }
  const auto generations = stream.result();
  for (std::size_t row = 0; row < generations.size(); ++row) {
    require(generations[row].token_ids == token_ids[row]);
    require(generations[row].text == texts[row]);
    require(generations[row].finish_reason != FinishReason::error);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* bytes, std::size_t size) {
  static const Runtime runtime(CHAMELEON_BUNDLE, {.threads = 1});
  FuzzedDataProvider data(bytes, size);
  const auto rows = data.ConsumeIntegralInRange<std::size_t>(1, 4);
  const auto capacity = data.ConsumeIntegralInRange<std::size_t>(8, 48);
  FactorTable table(data.ConsumeIntegralInRange<std::size_t>(1, rows));
  const auto& decoder = dynamic_cast<const SharedCacheDecoder&>(*runtime.impl().backend.decoder);
  const auto prefixes = decoder.prefix_cache(runtime.impl().bundle.digest, 4 * 16 * decoder.token_bytes());
  const auto batch =
      open_batch(decoder, table, rows, capacity, {data.ConsumeIntegralInRange<std::size_t>(8, 17)}, prefixes.get());
  Loop loop(*batch, table, runtime.tokenizer(), runtime.manifest().model.eos_token_id);
  std::vector<Stream> streams;
  while (data.remaining_bytes() > 0) {
    switch (data.ConsumeIntegralInRange(0, 3)) {
      case 0:
        try {
          const auto prompts = any_prompts(data);
          const auto [adapt, generate] = any_options(data, prompts.size());
          const Submission submission = prepare(runtime.impl(), prompts, generate, adapt, capacity);
          form_cohort(runtime.impl(), std::span(&submission, 1), 0);
          loop.wait(submission.members);
          streams.emplace_back(submission.stream);
        } catch (const Error&) {  // refused, and nothing of it may stay
        }
        break;
      case 1:
        if (!streams.empty()) streams[data.ConsumeIntegralInRange<std::size_t>(0, streams.size() - 1)].cancel();
        break;
      default:
        for (const auto& [stream, token] : loop.iterate().tokens) stream->deliver(token);
    }
  }
  while (!loop.empty()) {
    for (const auto& [stream, token] : loop.iterate().tokens) stream->deliver(token);
  }
  require(table.size() == 0 && batch->cached_tokens() == 0);
  for (const Stream& stream : streams) check_ended(stream);
  return 0;
}
