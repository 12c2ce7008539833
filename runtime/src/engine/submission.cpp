#include "engine/submission.h"

#include <set>

#include "chameleon/error.h"
#include "decode/prompt_lookup.h"

namespace chameleon {

std::optional<std::string> Submission::cohort_key() const {
  if (stream->mode == Mode::cohort) return "cohort";
  if (stream->mode != Mode::tenant) return std::nullopt;
  std::string key = "tenants";
  for (const std::string& tenant : std::set(adapt.tenants->begin(), adapt.tenants->end())) {
    key += ' ' + std::to_string(tenant.size()) + ' ' + tenant;
  }
  return key;
}

Submission prepare(const Runtime::Impl& runtime, const Texts& prompts, const Generate& generate, const Adapt& adapt,
                   std::size_t capacity, OnToken on_token, std::stop_token stop, const Tenant& tenant) {
  check(generate);
  check_drafts(generate.prompt_lookup_num_tokens, *runtime.backend.decoder);
  std::vector<TokenIds> ids = runtime.encode(prompts);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i].size() > capacity) {
      throw LengthError("prompt " + std::to_string(i) + " has " + std::to_string(ids[i].size()) +
                        " tokens, a row of this engine holds " + std::to_string(capacity));
    }
  }
  Adapt resolved = runtime.sources.resolve(adapt, ids.size());
  Embedded embedded = runtime.sources.embed_for_factors(ids, resolved);
  const auto stream = std::make_shared<Stream::State>(std::move(ids), embedded.cluster_ids, *resolved.mode, generate.n,
                                                      std::move(on_token), std::move(stop));
  Members members = members_of(
      begin_rows(stream->prompts, stream->cluster_ids, generate, capacity, runtime.bundle.manifest.model.vocab_size),
      stream, generate, tenant);
  return {stream, std::move(resolved), std::move(members), std::move(embedded)};
}

void form_cohort(const Runtime::Impl& runtime, std::span<const Submission> submissions, std::int64_t cohort_id) {
  Adapt adapt = submissions.front().adapt;
  Embedded all;
  if (adapt.tenants) adapt.tenants->clear();
  for (const Submission& submission : submissions) {
    const auto& [embeddings, cluster_ids] = submission.embedded;
    all.embeddings.insert(all.embeddings.end(), embeddings.begin(), embeddings.end());
    all.cluster_ids.insert(all.cluster_ids.end(), cluster_ids.begin(), cluster_ids.end());
    if (const auto& own = submission.adapt.tenants)
      adapt.tenants->insert(adapt.tenants->end(), own->begin(), own->end());
  }
  std::vector<std::span<const std::int64_t>> prompts;
  for (const Submission& submission : submissions) {
    prompts.insert(prompts.end(), submission.stream->prompts.begin(), submission.stream->prompts.end());
  }
  const RowSources found = runtime.sources.of_rows(adapt, prompts, all);
  std::size_t first = 0;  // prompt of the submission
  for (const Submission& submission : submissions) {
    if (submission.cohort_key()) submission.stream->set_cohort({cohort_id, all.cluster_ids.size()});
    for (const auto& member : submission.members) {
      const std::size_t prompt = first + member->row.index() / submission.stream->n;
      member->source = found.sources[static_cast<std::size_t>(found.factor_ids[prompt])];
      if (!found.starts.empty()) member->prompt->start = static_cast<std::size_t>(found.starts[prompt]);
    }
    first += submission.stream->prompts.size();
  }
}

}  // namespace chameleon
