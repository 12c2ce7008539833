// One submit, and the cohort whose prompts are averaged.
#pragma once

#include "chameleon/engine.h"
#include "engine/batch.h"
#include "runtime_impl.h"

namespace chameleon {

/// One call of Engine::submit.
struct Submission {
  std::shared_ptr<Stream::State> stream;
  Members members;    ///< n per prompt; those of one prompt are adjacent
  Embedded embedded;  ///< with the caller's vectors in place of embeddings where the hypernetwork reads those
  std::optional<std::string> tenant;
  std::optional<Factors> factors;  ///< valid during the submit only
  std::optional<std::string> adapter;

  /// Equal for submits that may share a cohort; none in modes without cohorts.
  [[nodiscard]] std::optional<std::string> cohort_key() const;
};

/// Check the arguments of Engine::submit, documented there, and embed the prompts.
/// capacity: tokens that a row can hold
Submission prepare(const Runtime::Impl& runtime, std::size_t capacity, const Texts& prompts, SubmitOptions options);

/// Set the factor sources of all members. The submissions have equal cohort keys, or there is a single one.
/// Throws ModeError or FactorsError.
void form_cohort(const Runtime::Impl& runtime, std::span<const Submission> submissions, std::int64_t cohort_id);

}  // namespace chameleon
