#include "completions.h"

#include <chrono>

#include "row_writer.h"

namespace chameleon::serve {

namespace {

constexpr Seconds kLook{0.05};  // between two looks whether the client is still there

/// The client has gone: nobody reads an answer.
class GoneError {};

/// Reads a job's tokens and looks from time to time whether the client is still there.
class Reader {
 public:
  Reader(const Job& job, const std::function<bool()>& is_connected) : job_(job), is_connected_(is_connected) {}

  /// The next token; none at the end. Throws GoneError.
  std::optional<Token> next() {
    if (!job_.stream) return std::nullopt;
    bool has_token = false;
    do {
      has_token = job_.stream->wait(kLook);
      if (Clock::now() - looked_ >= kLook) look();
    } while (!has_token);
    return job_.stream->next();
  }

 private:
  using Clock = std::chrono::steady_clock;

  void look() {
    looked_ = Clock::now();
    if (!is_connected_()) throw GoneError();
    if (job_.served.is_aborted) job_.stream->cancel();
  }

  const Job& job_;
  const std::function<bool()>& is_connected_;
  Clock::time_point looked_ = Clock::now();
};

/// Throws what ended a row, where it did not end by itself.
void require_success(const Generation& generation) {
  const FinishReason reason = generation.finish_reason;
  if (reason == FinishReason::stop || reason == FinishReason::length) return;
  if (generation.error) throw *generation.error;
  throw ApiError(503, "closed", "the request was cancelled before its end");
}

std::vector<RowWriter> row_writers(const Job& job, const std::vector<Echo>& echoes) {
  std::vector<RowWriter> writers;
  for (std::size_t row = 0; row < job.num_rows(); ++row) {
    const std::size_t prompt = row / static_cast<std::size_t>(job.request.n);
    writers.emplace_back(job, row, echoes.empty() ? nullptr : &echoes[prompt]);
  }
  return writers;
}

/// Send the parts of all rows. Throws GoneError, ApiError, or an Error.
void send_parts(const Job& job, const std::vector<Echo>& echoes, const std::function<bool()>& is_connected,
                const std::function<void(const Json&)>& send) {
  const StreamOptions options = job.request.stream_options.value_or(StreamOptions{});
  std::size_t new_tokens = 0;
  const auto send_choice = [&](const Json& choice) {
    Json chunk = job.completion(Json::array({choice}));
    chunk["usage"] = options.continuous_usage_stats ? job.usage(new_tokens) : Json();
    send(chunk);
  };
  std::vector<RowWriter> writers = row_writers(job, echoes);
  for (RowWriter& writer : writers) {
    if (!job.stream) {
      send_choice(writer.whole(nullptr));
    } else if (const auto prompt = writer.echo()) {
      send_choice(*prompt);
    }
  }
  Reader reader(job, is_connected);
  while (const std::optional<Token> token = reader.next()) {
    if (token->generation) require_success(*token->generation);
    std::vector<Choice> choices;
    if (token->token_id >= 0) choices.push_back({token->token_id, token->logprob, token->top_logprobs});
    new_tokens += choices.size();
    std::optional<FinishReason> reason;
    if (token->generation) reason = token->generation->finish_reason;
    send_choice(writers[token->row].part(token->text, choices, reason));
  }
  if (options.include_usage || options.continuous_usage_stats) {
    Json chunk = job.completion(Json::array());
    chunk["usage"] = job.usage(new_tokens);
    send(chunk);
  }
}

}  // namespace

std::optional<Json> complete(const Job& job, const std::vector<Echo>& echoes,
                             const std::function<bool()>& is_connected) try {
  std::vector<std::shared_ptr<const Generation>> generations(job.num_rows());
  Reader reader(job, is_connected);
  while (const std::optional<Token> token = reader.next()) {
    if (token->generation) generations[token->row] = token->generation;
  }
  std::vector<RowWriter> writers = row_writers(job, echoes);
  Json choices = Json::array();
  std::size_t new_tokens = 0;
  for (std::size_t row = 0; row < writers.size(); ++row) {
    if (generations[row]) {
      require_success(*generations[row]);
      new_tokens += generations[row]->token_ids.size();
    }
    choices.push_back(writers[row].whole(generations[row].get()));
  }
  Json answer = job.completion(std::move(choices));
  answer["usage"] = job.usage(new_tokens);
  return answer;
} catch (const GoneError&) {
  return std::nullopt;
}

void stream(const Job& job, const std::vector<Echo>& echoes, const std::function<bool()>& is_connected,
            const std::function<bool(std::string_view)>& write) {
  const auto send = [&](const Json& json) {
    if (!write("data: " + to_text(json) + "\n\n")) throw GoneError();
  };
  try {
    send_parts(job, echoes, is_connected, send);
    (void)write("data: [DONE]\n\n");
  } catch (const GoneError&) {
  } catch (const std::exception& error) {
    (void)write("data: " + to_text(api_error(error).body()) + "\n\n");
  }
}

}  // namespace chameleon::serve
