#include "row_writer.h"

namespace chameleon::serve {

namespace {

std::vector<Choice> choices_of(const Generation& generation) {
  std::vector<Choice> choices;
  for (std::size_t i = 0; i < generation.token_ids.size(); ++i) {
    choices.push_back({generation.token_ids[i]});
    if (generation.token_logprobs.empty()) continue;
    choices.back().logprob = generation.token_logprobs[i];
    choices.back().top_logprobs = generation.top_logprobs[i];
  }
  return choices;
}

}  // namespace

RowWriter::RowWriter(const Job& job, std::size_t row, const Echo* echo)
    : job_(job),
      row_(row),
      prompt_(row / static_cast<std::size_t>(job.request.n)),
      echo_(echo),
      logprobs_(writer(echo != nullptr ? num_characters(echo->text) : 0)) {}

std::optional<Json> RowWriter::echo() const {
  if (echo_ == nullptr) return std::nullopt;
  return choice(echo_->text, job_.request.logprobs ? writer(0, true).write(echo_->choices) : Json(), {}, {});
}

Json RowWriter::part(const std::string& text, const std::vector<Choice>& choices, std::optional<FinishReason> reason) {
  return choice(text, job_.request.logprobs ? logprobs_.write(choices) : Json(), reason, choices);
}

Json RowWriter::whole(const Generation* generation) {
  std::optional<Json> prompt = echo();
  if (generation == nullptr) {
    if (!prompt) return part("", {}, FinishReason::length);
    (*prompt)["finish_reason"] = "length";
    return *prompt;
  }
  Json row = part(generation->text, choices_of(*generation), generation->finish_reason);
  if (prompt) {
    row["text"] = echo_->text + generation->text;
    if (job_.request.logprobs) row["logprobs"] = join_logprobs((*prompt)["logprobs"], row["logprobs"]);
  }
  return row;
}

LogprobsWriter RowWriter::writer(std::size_t offset, bool with_special_tokens) const {
  const TokenNames& names = job_.served.names;
  LogprobsWriter::Name name = [&names](std::int64_t id) { return names[id]; };
  if (job_.request.return_tokens_as_token_ids) name = name_by_id;
  return {job_.served.runtime.tokenizer(), std::move(name), offset, with_special_tokens};
}

Json RowWriter::choice(const std::string& text, Json logprobs, std::optional<FinishReason> reason,
                       const std::vector<Choice>& new_tokens) const {
  const auto cohort = job_.stream ? job_.stream->cohort() : std::nullopt;
  Json json = {{"index", row_},
               {"text", text},
               {"logprobs", std::move(logprobs)},
               {"finish_reason", reason ? Json(*reason == FinishReason::stop ? "stop" : "length") : Json()},
               {"chameleon",
                {{"mode", to_string(job_.meant.mode)},
                 {"cluster_id", job_.cluster_ids[prompt_]},
                 {"cohort", cohort ? Json{{"id", cohort->id}, {"size", cohort->size}} : Json()}}}};
  if (job_.request.return_token_ids) {
    Json& ids = json["token_ids"] = Json::array();
    for (const Choice& token : new_tokens) ids.push_back(token.token_id);
    json["prompt_token_ids"] = job_.ids[prompt_];
  }
  return json;
}

}  // namespace chameleon::serve
