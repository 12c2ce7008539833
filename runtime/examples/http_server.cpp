// An HTTP service around the runtime: requests that wait together are generated as one batch, and every request is
// streamed its own tokens as JSON lines.
//
//   http_server BUNDLE [--port 8080] [--mode centroid] [--max-batch 8]
//   curl -N localhost:8080/generate -d '{"prompt": "The river", "max_new_tokens": 20}'
//
// The default mode is centroid: in mode cohort one caller's text changes another caller's output, so that mode must be
// asked for. A batch runs to its end before the next one starts, which is as simple as batching gets.

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

namespace {

using Json = nlohmann::json;

/// A queue between two threads; `pop` gives nothing once the queue is closed and empty, or is empty and need not wait.
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
  if (request->max_new_tokens < 1) throw chameleon::InputError("max_new_tokens must be at least 1");
  chameleon::Sampling& sampling = request->sampling;
  sampling.temperature = json.value("temperature", sampling.temperature);
  sampling.top_k = json.value("top_k", sampling.top_k);
  sampling.top_p = json.value("top_p", sampling.top_p);
  sampling.repetition_penalty = json.value("repetition_penalty", sampling.repetition_penalty);
  sampling.seed = json.value("seed", sampling.seed);
  sampling.stop = json.value("stop", sampling.stop);
  chameleon::check(sampling, runtime.manifest().model.vocab_size);
  request->tenant = json.value("tenant", "");
  return request;
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
    // One row's failure must not end the others: each goes on alone, and only the faulty one reports it.
    for (const auto& request : batch) {
      if (batch.size() > 1) {
        generate(runtime, mode, {request});
      } else {
        request->lines.push(Json({{"error", error.what()}, {"code", error.code()}}).dump() + '\n');
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

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> options = {{"--port", "8080"}, {"--mode", "centroid"}, {"--max-batch", "8"}};
  for (int i = 2; i + 1 < argc; i += 2) options[argv[i]] = argv[i + 1];
  if (argc % 2 != 0 || options.size() != 3) {
    std::cerr << "usage: http_server BUNDLE [--port 8080] [--mode centroid] [--max-batch 8]\n";
    return 2;
  }
  try {
    const chameleon::Mode mode = chameleon::parse_mode(options["--mode"]);
    const chameleon::Runtime runtime(argv[1], {.mode = mode});
    Channel<std::shared_ptr<Request>> waiting;
    std::jthread worker([&] { serve_batches(runtime, mode, std::stoul(options["--max-batch"]), waiting); });
    httplib::Server server;
    server.new_task_queue = [] { return new httplib::ThreadPool(64); };  // a streaming request holds its thread
    server.Get("/health", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("{\"status\": \"ok\"}\n", "application/json");
    });
    server.Post("/generate", [&](const httplib::Request& http, httplib::Response& response) {
      const auto refuse = [&](const char* code, const char* what) {
        response.status = httplib::StatusCode::BadRequest_400;
        response.set_content(Json({{"error", what}, {"code", code}}).dump() + '\n', "application/json");
      };
      try {
        const std::shared_ptr<Request> request = read_request(http.body, runtime);
        waiting.push(request);
        response.set_chunked_content_provider(
            "application/x-ndjson",
            [request](std::size_t, httplib::DataSink& sink) {
              const std::optional<std::string> line = request->lines.pop();
              if (line) return sink.write(line->data(), line->size());
              sink.done();
              return true;
            },
            [request](bool) { request->gone = true; });
      } catch (const chameleon::Error& error) {
        refuse(error.code(), error.what());
      } catch (const Json::exception& error) {
        refuse(chameleon::InputError::code_word, error.what());
      }
    });
    std::cout << "listening on port " << options["--port"] << std::endl;
    if (!server.listen("127.0.0.1", std::stoi(options["--port"]))) throw chameleon::InputError("cannot listen on it");
    waiting.close();
    return 0;
  } catch (const chameleon::Error& error) {
    std::cerr << "error: " << error.what() << " [" << error.code() << "]\n";
    return 2;
  }
}
