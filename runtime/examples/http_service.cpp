// The engine behind HTTP: POST /v1/completions in OpenAI's form, for texts, whole or as a stream of server-sent events.
// Requests share the batch, and a client that disconnects ends its rows. GET /health counts the rows present.
// It has no API keys, TLS, metrics or adapters: `python -m chameleon_deploy.serve` has. Port 0 is any free one.

#include <chameleon/engine.h>
#include <httplib.h>

#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

namespace {

using Json = nlohmann::json;

constexpr const char* kJson = "application/json";

struct Asked {
  std::vector<std::string> prompts;
  chameleon::Generate generate{};
  bool stream = false;
};

Asked parse(const std::string& body) {
  static const std::set<std::string> kFields = {"model", "prompt", "max_tokens", "temperature", "seed", "stream"};
  const Json json = Json::parse(body);
  for (const auto& field : json.items()) {
    if (!kFields.contains(field.key())) throw chameleon::InputError("leave out '" + field.key() + "'");
  }
  const Json prompt = json.at("prompt").is_string() ? Json::array({json.at("prompt")}) : json.at("prompt");
  Asked asked{.prompts = prompt};
  asked.stream = json.value("stream", asked.stream);
  asked.generate.max_new_tokens = json.value("max_tokens", std::int64_t{16});
  const std::uint64_t seed = json.value("seed", std::uint64_t{std::random_device{}()});
  const chameleon::Sampling sampling{.temperature = json.value("temperature", 1.0), .seed = seed};
  asked.generate.sampling = std::vector(asked.prompts.size(), sampling);  // each prompt as if it were alone
  return asked;
}

std::string to_text(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string error_text(const char* code, const char* message) {
  return to_text({{"error", {{"message", message}, {"type", "error"}, {"param", nullptr}, {"code", code}}}});
}

void refuse(httplib::Response& response, const std::exception_ptr& exception) try {
  std::rethrow_exception(exception);
} catch (const chameleon::Error& error) {
  static const std::map<std::string, int> kStatus = {
      {"queue_full", 429}, {"closed", 503}, {"bundle_changed", 503}, {"not_finite", 500}, {"request_failed", 500}};
  response.status = kStatus.contains(error.code()) ? kStatus.at(error.code()) : 400;
  response.set_content(error_text(error.code(), error.what()), kJson);
} catch (const Json::exception& error) {
  response.status = 400;
  response.set_content(error_text("input_invalid", error.what()), kJson);
}

/// The text of a row, and where it has ended, why. Throws the error that ended it.
Json choice(std::size_t row, const std::string& text, const chameleon::Generation* ended) {
  if (ended != nullptr && ended->error) throw *ended->error;
  const Json reason = ended != nullptr ? Json(chameleon::to_string(ended->finish_reason)) : Json();
  return {{"index", row}, {"text", text}, {"logprobs", nullptr}, {"finish_reason", reason}};
}

std::string completion(const Json& choices) {
  return to_text({{"id", "cmpl"}, {"object", "text_completion"}, {"created", std::time({})}, {"choices", choices}});
}

/// Pass on each token while the client is there. Returns whether all were.
bool read(const chameleon::Stream& stream, const httplib::Request& request, const auto& take) {
  while (!request.is_connection_closed()) {  // asked at each token, and every 50 ms
    if (!stream.wait(chameleon::Seconds(0.05))) continue;
    const auto token = stream.next();
    if (!token) return true;
    take(*token);
  }
  stream.cancel();
  return false;
}

void answer_whole(const chameleon::Stream& stream, const httplib::Request& request, httplib::Response& response) {
  if (!read(stream, request, [](const auto&) {})) return;
  Json choices = Json::array();
  for (const auto& row : stream.result()) choices.push_back(choice(choices.size(), row.text, &row));
  response.set_content(completion(choices), kJson);
}

void answer_in_parts(const chameleon::Stream& stream, const httplib::Request& request, httplib::Response& response) {
  const auto send = [stream, &request](std::size_t, httplib::DataSink& sink) {
    const auto write = [&](const std::string& data) { sink.os << "data: " << data << "\n\n" << std::flush; };
    const auto take = [&](const chameleon::Token& token) {
      write(completion(Json::array({choice(token.row, token.text, token.generation.get())})));
    };
    try {
      if (read(stream, request, take)) write("[DONE]");
    } catch (const chameleon::Error& error) {
      write(error_text(error.code(), error.what()));
    }
    sink.done();
    return true;
  };
  // The last argument is called at the end, also where the client went before the first part.
  response.set_chunked_content_provider("text/event-stream", send, [stream](bool) { stream.cancel(); });
}

void serve(const char* bundle, int port, const sigset_t& ends) {
  const chameleon::Runtime runtime(bundle);
  chameleon::Engine engine(runtime, {.rows = 8, .max_waiting = 1024});
  httplib::Server server;
  server.new_task_queue = [] { return new httplib::ThreadPool(64); };  // so many connections at a time; others wait
  server.set_payload_max_length(1 << 20);
  server.set_tcp_nodelay(true);
  server.set_exception_handler([](const auto&, auto& response, const auto& exception) { refuse(response, exception); });
  server.Get("/health", [&](const auto&, auto& response) {
    runtime.bundle().check_unchanged();
    const chameleon::Stats stats = engine.stats();
    response.set_content(to_text({{"rows", stats.running + stats.waiting}}), kJson);
  });
  server.Post("/v1/completions", [&](const auto& request, auto& response) {
    const Asked asked = parse(request.body);
    const chameleon::Stream stream = engine.submit(asked.prompts, asked.generate);
    asked.stream ? answer_in_parts(stream, request, response) : answer_whole(stream, request, response);
  });
  if (port != 0 && !server.bind_to_port("127.0.0.1", port)) throw chameleon::InputError("choose another port");
  if (port == 0) port = server.bind_to_any_port("127.0.0.1");
  std::jthread stopping([&] {
    int signal = 0;
    sigwait(&ends, &signal);
    server.stop();  // takes no new connection; those that are there get their answers
  });
  std::cerr << "listening on http://127.0.0.1:" << port << std::endl;
  server.listen_after_bind();
}  // the engine's destructor waits for its rows and ends its thread

}  // namespace

int main(int argc, char** argv) try {
  const bool is_port = argc == 3 && std::string(argv[2]).find_first_not_of("0123456789") == std::string::npos;
  if (!is_port) throw chameleon::InputError("usage: http_service BUNDLE PORT");
  sigset_t ends{};
  for (const int signal : {SIGTERM, SIGINT}) sigaddset(&ends, signal);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // before there are other threads
  serve(argv[1], std::stoi(argv[2]), ends);
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 2;
}
