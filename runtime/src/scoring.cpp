#include "scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "sampling.h"

namespace chameleon {

namespace {

// Rows times width of one pass; a longer row goes alone. Larger ones are no faster.
constexpr std::size_t kBatchTokens = 256;

/// Rows with something to predict, in passes of similar length, so that little is padding.
std::vector<std::vector<std::size_t>> passes(std::span<const TokenIds> rows, std::size_t max_rows) {
  std::vector<std::size_t> order;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (rows[row].size() > 1) order.push_back(row);
  }
  std::ranges::stable_sort(order, {}, [&](std::size_t row) { return rows[row].size(); });
  std::vector<std::vector<std::size_t>> passes;
  for (const std::size_t row : order) {
    if (passes.empty() || passes.back().size() == max_rows ||
        (passes.back().size() + 1) * (rows[row].size() - 1) > kBatchTokens) {
      passes.emplace_back();
    }
    passes.back().push_back(row);
  }
  return passes;
}

/// log softmax(logits)[target]; the sum in float64, as in Python.
float logprob_of(std::span<const float> logits, std::size_t target) {
  const float highest = logits[argmax(logits)];
  double sum = 0;
  for (const float logit : logits) sum += static_cast<double>(std::exp(logit - highest));
  return static_cast<float>(static_cast<double>(logits[target]) - static_cast<double>(highest) - std::log(sum));
}

/// As the decoder's, but a stop is an error of its own.
Logits all_logits(const Decoder& decoder, Rows rows, const RowFactors& factors, const std::stop_token& stop) {
  const auto cancelled = [] { return CancelledError("scoring was cancelled"); };
  if (stop.stop_requested()) throw cancelled();
  try {
    return decoder.all_logits(rows, factors, stop);
  } catch (const GraphError&) {
    if (stop.stop_requested()) throw cancelled();  // it is how ONNX Runtime reports that it was told to stop
    throw;
  }
}

}  // namespace

double Score::logprob() const {
  // float32 values of one text fit the 64 bits of a long double's mantissa, so their order does not matter.
  return static_cast<double>(std::accumulate(token_logprobs.begin(), token_logprobs.end(), 0.0L));
}

double Score::perplexity() const {
  if (token_logprobs.empty()) return std::numeric_limits<double>::quiet_NaN();
  return std::exp(-logprob() / static_cast<double>(token_logprobs.size()));
}

std::vector<Score> score_rows(std::span<const TokenIds> rows, const Decoder& decoder, const Adaptation& adaptation,
                              const std::stop_token& stop) {
  std::vector<Score> scores;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    scores.push_back({rows[row], std::vector<float>(rows[row].size() - 1), adaptation.cluster_ids[row]});
  }
  for (const std::vector<std::size_t>& members : passes(rows, decoder.max_rows())) {
    RowFactors factors{adaptation.factors, {}};
    std::vector<std::span<const std::int64_t>> inputs;  // the last token predicts nothing
    for (const std::size_t row : members) {
      factors.ids.push_back(adaptation.factor_ids[row]);
      inputs.push_back(std::span(rows[row]).first(rows[row].size() - 1));
    }
    Logits logits = all_logits(decoder, inputs, factors, stop);
    for (std::size_t i = 0; i < members.size(); ++i) {
      Score& score = scores[members[i]];
      for (std::size_t at = 0; at < inputs[i].size(); ++at) {
        score.token_logprobs[at] = logprob_of(logits.at(i, at), static_cast<std::size_t>(score.token_ids[at + 1]));
      }
    }
    for (const std::size_t row : members) {
      if (!std::ranges::all_of(scores[row].token_logprobs, [](float value) { return std::isfinite(value); })) {
        throw NumericError("text " + std::to_string(row) +
                           ": the decoder produced logits that are not finite: check the factors");
      }
    }
  }
  return scores;
}

}  // namespace chameleon
