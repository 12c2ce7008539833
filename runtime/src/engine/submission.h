// The prompts of one call, and the cohort whose prompts are averaged.
#pragma once

#include "chameleon/engine.h"
#include "engine/batch.h"
#include "runtime_impl.h"

namespace chameleon {

/// One call of Engine::submit, Runtime::stream or Runtime::generate.
struct Submission {
  std::shared_ptr<Stream::State> stream;
  Adapt adapt;      ///< resolved; its matrices are valid during the call only
  Members members;  ///< n per prompt; those of one prompt are adjacent
  Embedded embedded;

  /// Equal for submits that may share a cohort; none in modes without cohorts.
  [[nodiscard]] std::optional<std::string> cohort_key() const;
};

/// Check the arguments of these calls, documented there, and embed the prompts.
/// capacity: tokens that a row can hold
/// on_token, stop: see Stream::State
Submission prepare(const Runtime::Impl& runtime, const Texts& prompts, const Generate& generate, const Adapt& adapt,
                   std::size_t capacity, OnToken on_token = {}, std::stop_token stop = {}, const Tenant& tenant = {});

/// Set the factor sources of all members. The submissions have equal cohort keys, or there is a single one.
/// Throws ModeError, FactorsError or AdapterError.
void form_cohort(const Runtime::Impl& runtime, std::span<const Submission> submissions, std::int64_t cohort_id);

}  // namespace chameleon
