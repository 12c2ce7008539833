// chameleon-server: serve a bundle over HTTP, with the options and the API of `python -m chameleon_deploy.serve`.

#include <malloc.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <future>

#include "http.h"
#include "program.h"

namespace {

using namespace chameleon::serve;

constexpr std::chrono::seconds kFlushTime{5};  // for answers that are on their way when all requests have ended

constexpr const char* kHelp = R"(chameleon-server BUNDLE [options]

  --host ADDRESS          address to listen on (127.0.0.1)
  --port N                0 takes a free one (8000)
  --mode MODE             adaptation mode where a request names none
  --rows N                rows that are generated at a time (8)
  --max-waiting N         rows that may wait; more are refused with 429 (256)
  --prefill-tokens N      prompt tokens read between two steps (256)
  --capacity N            tokens of a row, prompt and answer (the model's positions)
  --max-factor-sets N     factor sets of the running rows (as many as --rows)
  --adapters DIR          let requests load adapter files of this directory
  --max-adapter-bytes N   of loaded adapters that stay in memory (1073741824)
  --api-keys FILE         JSON file, {"key": "tenant"}
  --cohort-window-ms X    join cohorts of requests this close (0)
  --max-body-bytes N      larger bodies are refused with 413 (4194304)
  --max-requests N        requests at a time; more are refused with 429 (512)
  --drain-seconds X       for requests to end after SIGTERM (30)
  --provider NAME         cpu, tensorrt in a build that has it, or auto (cpu)
  --threads N             threads of ONNX Runtime
  --share-weights         map weights that other processes share
  --trusted-key FILE      refuse a bundle that this Ed25519 public key (PEM) did not sign; may be given several times
  --log-json              one JSON object per log line
  --log-prompts           log the bodies of requests
  --ssl-certfile FILE     TLS certificate, PEM
  --ssl-keyfile FILE      TLS private key, PEM
)";

struct Arguments {
  Settings settings;
  Address address;
  bool log_json = false;
};

std::filesystem::path file(const std::string& option, const std::string& path) {
  if (std::filesystem::is_regular_file(path)) return path;
  throw UsageError("invalid value for " + option + ": file '" + path + "' does not exist");
}

std::filesystem::path directory(const std::string& option, const std::string& path) {
  if (std::filesystem::is_directory(path)) return path;
  throw UsageError("invalid value for " + option + ": directory '" + path + "' does not exist");
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments parsed;
  Settings& settings = parsed.settings;
  Address& address = parsed.address;
  const Options options = {
      {"--host", [&](auto&, auto& text) { address.host = text; }},
      {"--port", [&](auto& option, auto& text) { address.port = number<std::uint16_t>(option, text); }},
      {"--mode", [&](auto&, auto& text) { settings.mode = chameleon::parse_mode(text); }},
      {"--rows", [&](auto& option, auto& text) { settings.rows = number<std::size_t>(option, text, 1); }},
      {"--max-waiting", [&](auto& option, auto& text) { settings.max_waiting = number<std::size_t>(option, text); }},
      {"--prefill-tokens",
       [&](auto& option, auto& text) { settings.prefill_tokens = number<std::size_t>(option, text, 1); }},
      {"--capacity", [&](auto& option, auto& text) { settings.capacity = number<std::size_t>(option, text, 1); }},
      {"--max-factor-sets",
       [&](auto& option, auto& text) { settings.max_factor_sets = number<std::size_t>(option, text, 1); }},
      {"--adapters", [&](auto& option, auto& path) { settings.adapters = directory(option, path); }},
      {"--max-adapter-bytes",
       [&](auto& option, auto& text) { settings.max_adapter_bytes = number<std::size_t>(option, text, 1); }},
      {"--api-keys", [&](auto&, auto& text) { settings.api_keys = text; }},
      {"--cohort-window-ms",
       [&](auto& option, auto& text) { settings.cohort_window_ms = number<double>(option, text, 0); }},
      {"--max-body-bytes",
       [&](auto& option, auto& text) { settings.max_body_bytes = number<std::size_t>(option, text, 1); }},
      {"--max-requests",
       [&](auto& option, auto& text) { settings.max_requests = number<std::size_t>(option, text, 1); }},
      {"--drain-seconds", [&](auto& option, auto& text) { settings.drain_seconds = number<double>(option, text, 0); }},
      {"--provider", [&](auto&, auto& text) { settings.provider = text; }},
      {"--threads", [&](auto& option, auto& text) { settings.threads = number<int>(option, text, 1); }},
      {"--trusted-key",
       [&](auto&, auto& text) {
         if (!settings.trusted_keys) settings.trusted_keys.emplace();
         settings.trusted_keys->push_back(text);
       }},
      {"--ssl-certfile", [&](auto& option, auto& text) { address.certificate = file(option, text); }},
      {"--ssl-keyfile", [&](auto& option, auto& text) { address.key = file(option, text); }},
  };
  const Flags flags = {{"--share-weights", settings.share_weights},
                       {"--log-json", parsed.log_json},
                       {"--log-prompts", settings.log_prompts}};
  settings.bundle = parse_words(words, options, flags);
  return parsed;
}

/// Block the signals that end the program, for this thread and those that it starts, and return them.
sigset_t block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

void wait_for(const sigset_t& signals) {
  int signal = 0;
  sigwait(&signals, &signal);
}

void serve(const Arguments& arguments) {
  const sigset_t signals = block_signals();
  const auto wake_up = [] { ::kill(::getpid(), SIGTERM); };
  const Log log(arguments.log_json);
  Service service(arguments.settings);
  HttpServer server(service, log, arguments.address);
  log.info("listening on " + server.url());
  auto listening = std::async(std::launch::async, [&] { server.run(); });
  auto loading = std::async(std::launch::async, [&] {
    try {
      service.open();
      malloc_trim(0);  // ONNX Runtime frees much of what it makes while it optimizes a graph
    } catch (...) {
      wake_up();
      throw;
    }
  });
  wait_for(signals);
  auto draining = std::async(std::launch::async, [&] {
    loading.wait();
    service.drain();
    server.stop();
    wake_up();
  });
  wait_for(signals);  // the end of the drain, or the second signal, which does not wait for requests
  service.abort();
  draining.get();
  loading.get();
  // A client that reads too slowly must not hold up the end.
  if (listening.wait_for(kFlushTime) == std::future_status::timeout) std::quick_exit(EXIT_SUCCESS);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (std::ranges::find(words, "--help") != words.end()) {
    std::cout << kHelp;
    return 0;
  }
  return run_program([&] { serve(parse(words)); });
}
