#include "decode/logits_scorer.h"

#include <algorithm>
#include <cmath>

#include "chameleon/error.h"
#include "sampling.h"

namespace chameleon {

namespace {

// Rows times width of one call; a longer row goes alone. Larger calls are no faster.
constexpr std::size_t kBatchTokens = 256;

/// log softmax(logits)[target], summed in float64 as in Python.
float logprob_of(std::span<const float> logits, std::size_t target) {
  const float highest = logits[argmax(logits)];
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - highest));
  return static_cast<float>(static_cast<double>(logits[target]) - static_cast<double>(highest) - std::log(sum));
}

}  // namespace

std::vector<std::vector<float>> logprobs_of_logits(
    Rows rows, const RowFactors& factors, std::size_t max_rows, const std::stop_token& stop,
    const std::function<Logits(Rows rows, const RowFactors& factors)>& all_logits) {
  std::vector<std::vector<float>> logprobs;
  const std::vector inputs = without_last(rows);
  for (const Part& part : parts(inputs, kBatchTokens, max_rows)) {
    if (stop.stop_requested()) throw CancelledError("scoring was cancelled");
    const Rows members = Rows(inputs).subspan(part.first, part.count);
    Logits logits = all_logits(members, factors.rows(part.indices()));
    for (std::size_t i = 0; i < members.size(); ++i) {
      std::vector<float>& values = logprobs.emplace_back();
      for (std::size_t at = 0; at < members[i].size(); ++at) {
        values.push_back(logprob_of(logits.at(i, at), static_cast<std::size_t>(rows[part.first + i][at + 1])));
      }
    }
  }
  return logprobs;
}

}  // namespace chameleon
