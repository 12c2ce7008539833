#include "engine/submission.h"

#include <algorithm>

#include "adaptation.h"
#include "chameleon/error.h"

namespace chameleon {

std::optional<std::string> Submission::cohort_key() const {
  if (stream->mode == Mode::cohort) return "cohort";
  if (stream->mode == Mode::tenant) return "tenant " + tenant.value();
  return std::nullopt;
}

/// The adapter of each prompt of one submit.
static std::optional<AdapterNames> each(const std::optional<std::string>& adapter, std::size_t prompts) {
  return adapter ? std::optional(AdapterNames(prompts, adapter)) : std::nullopt;
}

Submission prepare(const Runtime::Impl& runtime, std::size_t capacity, const Texts& prompts, SubmitOptions options) {
  if (options.n < 1) throw InputError("n must be at least 1, got 0");
  if (options.adapt_tokens == 0) throw InputError("adapt_tokens must be at least 1, got 0");
  if (options.deadline && !(*options.deadline > Seconds::zero())) {
    throw InputError("deadline must be a number of seconds above 0, got " + std::to_string(options.deadline->count()));
  }
  std::vector<TokenIds> ids = runtime.encode(prompts);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i].size() > capacity) {
      throw LengthError("prompt " + std::to_string(i) + " has " + std::to_string(ids[i].size()) +
                        " tokens, a row of this engine holds " + std::to_string(capacity));
    }
  }
  std::optional<std::vector<std::string>> tenants;
  if (options.tenant) tenants.emplace(ids.size(), *options.tenant);
  const Mode mode =
      runtime.check_arguments(options.mode, tenants, options.factors, each(options.adapter, ids.size()), ids.size());
  check_conditioning(mode, options.conditioning, runtime.bundle.manifest.adaptation.conditioning_size, ids.size());
  std::vector<TokenIds> adapted;
  for (const TokenIds& row : ids) {
    adapted.emplace_back(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(std::min(
                                                        row.size(), options.adapt_tokens.value_or(row.size()))));
  }
  Embedded embedded = runtime.embed(adapted);
  if (const auto& given = options.conditioning) embedded.embeddings.assign(given->values.begin(), given->values.end());
  auto stream = std::make_shared<Stream::State>(std::move(ids), embedded.cluster_ids, mode, options.n,
                                                std::move(options.on_token));
  std::vector<Row> rows =
      begin_rows(stream->prompts, stream->cluster_ids, options.max_new_tokens, options.sampling, options.n,
                 static_cast<std::int64_t>(capacity), runtime.bundle.manifest.model.vocab_size);
  const Clock::time_point now = Clock::now();
  const auto end = options.deadline ? now + std::chrono::duration_cast<Clock::duration>(bounded(*options.deadline))
                                    : Clock::time_point::max();
  Submission submission{stream,
                        {},
                        std::move(embedded),
                        std::move(options.tenant),
                        std::move(options.factors),
                        std::move(options.adapter)};
  std::shared_ptr<Prompt> prompt;
  for (Row& row : rows) {
    if (row.index() % options.n == 0) prompt = std::make_shared<Prompt>(Prompt{row.prompt()});
    submission.members.push_back(std::make_shared<Member>(Member{stream, prompt, std::move(row), now, end, now}));
  }
  return submission;
}

void form_cohort(const Runtime::Impl& runtime, std::span<const Submission> submissions, std::int64_t cohort_id) {
  const Submission& first = submissions.front();
  Embedded all;
  for (const Submission& submission : submissions) {
    const auto& [embeddings, cluster_ids] = submission.embedded;
    all.embeddings.insert(all.embeddings.end(), embeddings.begin(), embeddings.end());
    all.cluster_ids.insert(all.cluster_ids.end(), cluster_ids.begin(), cluster_ids.end());
  }
  std::optional<std::vector<std::string>> tenants;
  if (first.tenant) tenants.emplace(all.cluster_ids.size(), *first.tenant);
  const std::vector<FactorSource> sources = runtime.factor_sources(first.stream->mode, all, tenants, first.factors,
                                                                   each(first.adapter, all.cluster_ids.size()));
  auto of_prompt = sources.begin();
  for (const Submission& submission : submissions) {
    if (submission.cohort_key()) submission.stream->set_cohort({cohort_id, all.cluster_ids.size()});
    for (const auto& member : submission.members) {
      member->source = of_prompt[static_cast<std::ptrdiff_t>(member->row.index() / submission.stream->n)];
    }
    of_prompt += std::ssize(submission.stream->prompts);
  }
}

}  // namespace chameleon
