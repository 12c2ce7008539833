// An HTTP service around the runtime: requests that wait together are generated as one batch, and every request is
// streamed its own tokens as JSON lines. A request that fails before its first token is answered with status 400.
//
//   http_server BUNDLE [--port 8080] [--mode centroid] [--max-batch 8]
//   curl -N localhost:8080/generate -d '{"prompt": "The river", "max_new_tokens": 20}'
//
// The default mode is centroid: in mode cohort one caller's text changes another caller's output, so that mode must be
// chosen explicitly. Batching is the simplest kind: a batch runs to its end before the next one starts.

#include <httplib.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <iostream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "chameleon/runtime.h"
#include "program.h"

namespace {

using Json = nlohmann::json;

/// A queue between two threads. `pop` returns nothing once the queue is closed and empty, or, with wait=false, as soon
/// as it is empty.
template <class T>
class Channel {
 public:
  void push(T item) {
    const std::lock_guard lock(mutex_);
    items_.push_back(std::move(item));
    changed_.notify_one();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  std::optional<T> pop(bool wait = true) {
    std::unique_lock lock(mutex_);
    if (wait) changed_.wait(lock, [this] { return closed_ || !items_.empty(); });
    if (items_.empty()) return std::nullopt;
    T item = std::move(items_.front());
    items_.pop_front();
    return item;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<T> items_;
  bool closed_ = false;
};

struct Request {
  chameleon::TokenIds prompt;
  std::int64_t max_new_tokens = 20;
  chameleon::Sampling sampling;
  std::string tenant;
  Channel<std::string> lines;
  bool failed = false;             // before its first token; set before its only line, the error
  std::size_t sent = 0;            // tokens, so that a second attempt does not repeat them
  std::atomic<bool> gone = false;  // the client has closed the connection
};

using Batch = std::vector<std::shared_ptr<Request>>;

std::shared_ptr<Request> read_request(const std::string& body, const chameleon::Runtime& runtime) {
  const Json json = Json::parse(body);
  auto request = std::make_shared<Request>();
  const std::string prompt = json.at("prompt");
  request->prompt = runtime.encode(std::span(&prompt, 1)).front();
  request->max_new_tokens = json.value("max_new_tokens", request->max_new_tokens);
  chameleon::Sampling& sampling = request->sampling;
  sampling.temperature = json.value("temperature", sampling.temperature);
  sampling.top_k = json.value("top_k", sampling.top_k);
  sampling.top_p = json.value("top_p", sampling.top_p);
  sampling.repetition_penalty = json.value("repetition_penalty", sampling.repetition_penalty);
  sampling.seed = json.value("seed", sampling.seed);
  sampling.stop = json.value("stop", sampling.stop);
  request->tenant = json.value("tenant", "");
  return request;
}

std::string error_line(const char* code, const char* message) {
  return Json({{"error", message}, {"code", code}}).dump() + '\n';
}

void send(Request& request, const chameleon::Token& token) {
  Json line = {{"text", token.text}, {"token_id", token.token_id}};
  if (token.generation != nullptr) {
    line["finish_reason"] = chameleon::to_string(token.generation->finish_reason);
    line["cluster_id"] = token.generation->cluster_id;
  }
  request.lines.push(line.dump() + '\n');
}

void generate(const chameleon::Runtime& runtime, chameleon::Mode mode, const Batch& batch) {
  std::vector<chameleon::TokenIds> prompts;
  std::vector<std::int64_t> limits;
  std::vector<chameleon::Sampling> samplings;  // one each: a request's tokens do not depend on its place in the batch
  std::vector<std::string> tenants;
  for (const auto& request : batch) {
    prompts.push_back(request->prompt);
    limits.push_back(request->max_new_tokens);
    samplings.push_back(request->sampling);
    tenants.push_back(request->tenant);
  }
  chameleon::GenerateOptions options{{.mode = mode}, limits, samplings};
  if (mode == chameleon::Mode::tenant) options.tenants = tenants;
  std::vector<std::size_t> seen(batch.size());
  options.on_token = [&](const chameleon::Token& token) {
    Request& request = *batch[token.row];
    if (++seen[token.row] > request.sent) {
      send(request, token);
      ++request.sent;
    }
    if (token.generation != nullptr) request.lines.close();
    return !request.gone;
  };
  try {
    runtime.generate(prompts, options);
  } catch (const chameleon::Error& error) {
    // One row's failure must not end the others: each is generated alone, and only the faulty one reports the error.
    for (const auto& request : batch) {
      if (batch.size() > 1) {
        generate(runtime, mode, {request});
      } else {
        request->failed = request->sent == 0;
        request->lines.push(error_line(error.code(), error.what()));
      }
    }
  }
  for (const auto& request : batch) request->lines.close();
}

void serve_batches(const chameleon::Runtime& runtime, chameleon::Mode mode, std::size_t max_batch,
                   Channel<std::shared_ptr<Request>>& waiting) {
  while (auto first = waiting.pop()) {
    Batch batch = {*first};
    while (batch.size() < max_batch) {
      auto next = waiting.pop(false);
      if (!next) break;
      batch.push_back(*next);
    }
    generate(runtime, mode, batch);
  }
}

struct Options {
  std::filesystem::path bundle;
  std::uint16_t port = 8080;
  chameleon::Mode mode = chameleon::Mode::centroid;
  std::size_t max_batch = 8;
};

constexpr const char* kUsage = "http_server BUNDLE [--port 8080] [--mode centroid] [--max-batch 8]";

Options parse(std::span<char*> words) {
  Options options;
  if (words.size() % 2 != 1) throw UsageError(std::string("expected ") + kUsage);
  options.bundle = words[0];
  for (std::size_t i = 1; i < words.size(); i += 2) {
    const std::string option = words[i], value = words[i + 1];
    if (option == "--port") {
      options.port = number<std::uint16_t>(option, value, 1);
    } else if (option == "--mode") {
      options.mode = chameleon::parse_mode(value);
    } else if (option == "--max-batch") {
      options.max_batch = number<std::size_t>(option, value, 1);
    } else {
      throw UsageError("no such option: " + option);
    }
  }
  return options;
}

/// Answer with the request's lines as they come, or with status 400 where the first one is an error.
void answer(const std::shared_ptr<Request>& request, httplib::Response& response) {
  std::optional<std::string> line = request->lines.pop();
  if (request->failed) {
    response.status = httplib::StatusCode::BadRequest_400;
    response.set_content(line.value_or(""), "application/json");
    return;
  }
  response.set_chunked_content_provider(
      "application/x-ndjson",
      [request, line](std::size_t, httplib::DataSink& sink) mutable {
        if (!line) {
          sink.done();
          return true;
        }
        if (!sink.write(line->data(), line->size())) return false;
        line = request->lines.pop();
        return true;
      },
      [request](bool) { request->gone = true; });
}

void serve(const Options& options) {
  const chameleon::Runtime runtime(options.bundle, {.mode = options.mode});
  Channel<std::shared_ptr<Request>> waiting;
  std::jthread worker([&] { serve_batches(runtime, options.mode, options.max_batch, waiting); });
  httplib::Server server;
  server.new_task_queue = [] { return new httplib::ThreadPool(64); };  // a streaming request holds its thread
  server.Get("/health", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("{\"status\": \"ok\"}\n", "application/json");
  });
  server.Post("/generate", [&](const httplib::Request& http, httplib::Response& response) {
    const auto refuse = [&](const char* code, const char* message) {
      response.status = httplib::StatusCode::BadRequest_400;
      response.set_content(error_line(code, message), "application/json");
    };
    try {
      const std::shared_ptr<Request> request = read_request(http.body, runtime);
      waiting.push(request);
      answer(request, response);
    } catch (const chameleon::Error& error) {
      refuse(error.code(), error.what());
    } catch (const Json::exception& error) {
      refuse(chameleon::InputError::code_word, error.what());
    }
  });
  std::cout << "listening on port " << options.port << std::endl;
  const bool listened = server.listen("127.0.0.1", options.port);
  waiting.close();
  if (!listened) throw chameleon::InputError("cannot listen on port " + std::to_string(options.port));
}

}  // namespace

int main(int argc, char** argv) {
  const std::span words(argv + 1, argv + argc);
  if (std::ranges::find(words, std::string_view("--help")) != words.end()) {
    std::cout << kUsage << '\n';
    return 0;
  }
  return run_program([&] { serve(parse(words)); });
}
