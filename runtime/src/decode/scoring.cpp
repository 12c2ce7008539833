#include "decode/scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "sampling.h"

namespace chameleon {

namespace {

/// Run a call of the decoder, whose failure is no fault where it was told to stop: ONNX Runtime reports that so.
void run_until(const std::stop_token& stop, const auto& work) {
  try {
    if (!stop.stop_requested()) return work();
  } catch (const GraphError&) {
    if (!stop.stop_requested()) throw;
  }
  throw CancelledError("scoring was cancelled");
}

}  // namespace

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
  run_until(stop, [&] { logprobs = decoder.token_logprobs(inputs, adaptation.factors.rows(members), stop); });
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (!std::ranges::all_of(logprobs[i], [](float value) { return std::isfinite(value); })) {
      throw NumericError("text " + std::to_string(members[i]) +
                         ": the decoder produced logits that are not finite: check the factors");
    }
    scores[members[i]].token_logprobs = std::move(logprobs[i]);
  }
  return scores;
}

std::vector<std::vector<Choice>> prompt_logprobs(std::span<const TokenIds> texts, const Decoder& decoder,
                                                 const RowFactors& factors, int count, const std::stop_token& stop) {
  if (count < 0 || count > kMaxLogprobs) throw InputError("count must be an integer from 0 to 20");
  if (factors.factor_ids.size() != texts.size()) {
    throw InputError(std::to_string(factors.factor_ids.size()) + " rows of factors for " +
                     std::to_string(texts.size()) + " texts: pass those that adapt returns");
  }
  std::vector<std::vector<Choice>> choices(texts.size());
  for (std::size_t row = 0; row < texts.size(); ++row) {
    if (texts[row].size() == 1) continue;
    const std::span<const std::int64_t> ids(texts[row]), input = ids.first(ids.size() - 1);
    const auto take = [&](std::size_t start, Logits logits) {
      for (std::size_t i = 0; i < logits.positions(); ++i) {
        choices[row].push_back(log_probabilities(logits.at(0, i), ids[start + i + 1], count));
      }
    };
    run_until(stop, [&] { decoder.all_logits(Rows(&input, 1), factors.rows(std::span(&row, 1)), take, stop); });
  }
  return choices;
}

}  // namespace chameleon
