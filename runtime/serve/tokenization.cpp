#include "tokenization.h"

namespace chameleon::serve {

Json tokenize(const TokenizeRequest& request, const Served& served) {
  (void)served.models.resolve(request.model);
  const Tokenizer& tokenizer = served.runtime.tokenizer();
  const TokenIds ids = tokenizer.encode(request.prompt);
  Json answer = {{"count", ids.size()}, {"max_model_len", served.models.max_length()}, {"tokens", ids}};
  if (request.return_token_strs) {
    Json& tokens = answer["token_strs"] = Json::array();
    for (const std::int64_t id : ids) tokens.push_back(tokenizer.token(id));
  }
  return answer;
}

Json detokenize(const DetokenizeRequest& request, const Served& served) {
  (void)served.models.resolve(request.model);
  const std::int64_t vocab_size = served.runtime.manifest().model.vocab_size;
  for (const std::int64_t id : request.tokens) {
    if (id < vocab_size) continue;
    throw ApiError(422, "token_invalid",
                   "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocab_size),
                   "tokens");
  }
  return {{"prompt", served.runtime.tokenizer().decode(request.tokens, false)}};
}

Json tokenizer_info(const Served& served) {
  const ModelSpec& model = served.runtime.manifest().model;
  return {{"tokenizer_class", "BPE"},  // the only kind that this runtime reads
          {"vocab_size", model.vocab_size},
          {"model_max_length", model.max_positions},
          {"eos_token", served.runtime.tokenizer().token(model.eos_token_id)},
          {"eos_token_id", model.eos_token_id},
          {"bos_token", nullptr},
          {"pad_token", nullptr}};
}

}  // namespace chameleon::serve
