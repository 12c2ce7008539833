#include "echo.h"

#include <algorithm>

namespace chameleon::serve {

namespace {

/// The choices of every prompt's tokens.
void score(const Job& job, const std::optional<std::string>& tenant, std::vector<Echo>& echoes) {
  const Runtime& runtime = job.served.runtime;
  std::vector<TokenIds> read = job.ids;
  if (const auto& limit = job.request.adapt_tokens) {
    for (TokenIds& ids : read) ids.resize(std::min(ids.size(), static_cast<std::size_t>(*limit)));
  }
  AdaptOptions options{.mode = job.meant.mode};
  if (job.meant.adapter) options.adapters = AdapterNames(read.size(), job.meant.adapter);
  if (job.meant.mode == Mode::tenant) options.tenants = std::vector(read.size(), tenant.value_or(""));
  if (job.request.conditioning) options.conditioning = job.request.conditioning->matrix();
  const Adaptation adaptation = runtime.adapt(read, options);
  for (std::size_t i = 0; i < echoes.size(); ++i) {
    const std::lock_guard alone(job.served.scorer);
    const std::size_t row[] = {i};
    const auto choices = runtime.prompt_logprobs(std::span(&job.ids[i], 1), adaptation.factors.rows(row),
                                                 static_cast<int>(*job.request.logprobs));
    echoes[i].choices.push_back({job.ids[i].front()});  // nothing predicts the first token
    echoes[i].choices.insert(echoes[i].choices.end(), choices.front().begin(), choices.front().end());
  }
}

}  // namespace

std::vector<Echo> echoes(const Job& job, const std::optional<std::string>& tenant) {
  std::vector<Echo> found;
  if (!job.request.echo) return found;
  const auto* texts = std::get_if<std::vector<std::string>>(&job.request.prompt);
  for (std::size_t i = 0; i < job.ids.size(); ++i) {
    found.push_back({texts != nullptr ? texts->at(i) : job.served.runtime.tokenizer().decode(job.ids[i], false), {}});
  }
  if (job.request.logprobs) score(job, tenant, found);
  return found;
}

}  // namespace chameleon::serve
