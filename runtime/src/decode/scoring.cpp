#include "decode/scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace chameleon {

double Score::logprob() const {
  // The 64-bit mantissa of a long double holds the sum of one text's float32 values, so their order does not matter.
  return static_cast<double>(std::accumulate(token_logprobs.begin(), token_logprobs.end(), 0.0L));
}

double Score::perplexity() const {
  if (token_logprobs.empty()) return std::numeric_limits<double>::quiet_NaN();
  return std::exp(-logprob() / static_cast<double>(token_logprobs.size()));
}

std::vector<Score> score_rows(std::span<const TokenIds> rows, const Decoder& decoder, const Adaptation& adaptation,
                              const std::stop_token& stop) {
  std::vector<Score> scores;
  std::vector<std::size_t> members;  // rows of more than one token
  for (std::size_t row = 0; row < rows.size(); ++row) {
    scores.push_back({rows[row], {}, adaptation.cluster_ids[row]});
    if (rows[row].size() > 1) members.push_back(row);
  }
  // Rows of similar length share calls, so that little is padding.
  std::ranges::stable_sort(members, {}, [&](std::size_t row) { return rows[row].size(); });
  std::vector<std::span<const std::int64_t>> inputs;
  for (const std::size_t row : members) inputs.emplace_back(rows[row]);
  std::vector<std::vector<float>> logprobs;
  try {
    logprobs = decoder.token_logprobs(inputs, adaptation.factors.rows(members), stop);
  } catch (const GraphError&) {
    if (stop.stop_requested()) throw CancelledError("scoring was cancelled");  // ONNX Runtime reports it as a failure
    throw;
  }
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (!std::ranges::all_of(logprobs[i], [](float value) { return std::isfinite(value); })) {
      throw NumericError("text " + std::to_string(members[i]) +
                         ": the decoder produced logits that are not finite: check the factors");
    }
    scores[members[i]].token_logprobs = std::move(logprobs[i]);
  }
  return scores;
}

}  // namespace chameleon
