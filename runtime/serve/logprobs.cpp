#include "logprobs.h"

#include <algorithm>

#include "utf8.h"

namespace chameleon::serve {

namespace {

/// JSON has no minus infinity.
double to_number(float logprob) { return std::max(static_cast<double>(logprob), -9999.0); }

}  // namespace

Json LogprobsWriter::write(std::span<const Choice> choices) {
  Json tokens = Json::array(), logprobs = Json::array(), tops = Json::array(), offsets = Json::array();
  for (const Choice& choice : choices) {
    tokens.push_back(name_(choice.token_id));
    logprobs.push_back(choice.logprob ? Json(to_number(*choice.logprob)) : Json());
    tops.push_back(choice.logprob ? top(choice) : Json());
    offsets.push_back(offset_);
    const std::string_view bytes = tokenizer_.bytes(choice.token_id);
    unfinished_ += bytes.empty() && with_special_tokens_ ? tokenizer_.token(choice.token_id) : bytes;
    const std::string text = replace_invalid_utf8(unfinished_);
    if (!text.ends_with(kReplacement)) {
      offset_ += num_characters(text);
      unfinished_.clear();
    }
  }
  return {{"tokens", tokens}, {"token_logprobs", logprobs}, {"top_logprobs", tops}, {"text_offset", offsets}};
}

Json LogprobsWriter::top(const Choice& choice) const {
  Json names = Json::object();
  for (const auto& [token_id, logprob] : choice.top_logprobs) names[name_(token_id)] = to_number(logprob);
  names[name_(choice.token_id)] = to_number(*choice.logprob);
  return names;
}

std::size_t num_characters(std::string_view text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

Json join_logprobs(Json first, const Json& second) {
  for (const auto& [name, values] : second.items()) {
    for (const Json& value : values) first[name].push_back(value);
  }
  return first;
}

}  // namespace chameleon::serve
