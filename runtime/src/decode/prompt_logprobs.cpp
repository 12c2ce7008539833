#include "decode/prompt_logprobs.h"

#include "sampling.h"

namespace chameleon {

std::vector<std::vector<Choice>> prompt_logprobs(std::span<const TokenIds> texts, const Decoder& decoder,
                                                 const RowFactors& factors, int count, const std::stop_token& stop) {
  if (count < 0 || count > kMaxLogprobs) throw InputError("count must be an integer from 0 to 20");
  if (factors.factor_ids.size() != texts.size()) {
    throw InputError(std::to_string(factors.factor_ids.size()) + " rows of factors for " +
                     std::to_string(texts.size()) + " texts: pass those that adapt returns");
  }
  std::vector<std::vector<Choice>> choices(texts.size());
  for (std::size_t row = 0; row < texts.size(); ++row) {
    if (stop.stop_requested()) throw CancelledError("scoring was cancelled");
    if (texts[row].size() == 1) continue;
    const std::span<const std::int64_t> ids(texts[row]), input = ids.first(ids.size() - 1);
    const auto take = [&](std::size_t start, Logits logits) {
      for (std::size_t i = 0; i < logits.positions(); ++i) {
        choices[row].push_back(log_probabilities(logits.at(0, i), ids[start + i + 1], count));
      }
    };
    try {
      decoder.all_logits(Rows(&input, 1), factors.rows(std::span(&row, 1)), take, stop);
    } catch (const GraphError&) {
      if (stop.stop_requested()) throw CancelledError("scoring was cancelled");  // ONNX Runtime reports it as a failure
      throw;
    }
  }
  return choices;
}

}  // namespace chameleon
