// Measures decoding speed, the time spent outside Session::Run, and resident memory. Prints one line of JSON.
//
//   chameleon_bench decode BUNDLE [batch] [tokens]
//       milliseconds per step, and the share spent outside Session::Run
//   chameleon_bench engine BUNDLE [rounds]
//       tokens per second of 8 callers of an engine, each with one request at a time, and of `generate` with 8 rows, in
//       turns; the engine's milliseconds per step of 8 rows, and the time of it spent outside Session::Run
//   chameleon_bench load BUNDLE [packed|shared]
//       resident memory after loading and after generating 32 tokens
//
// Time inside Session::Run is measured by wrapping OrtApi::Run in this program's copy of the function table, so the
// library itself carries no instrumentation.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "chameleon/engine.h"

namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;
using chameleon::TokenIds;

OrtApi timed_api;
decltype(OrtApi::Run) real_run;
thread_local Clock::duration inside_run{};

OrtStatusPtr ORT_API_CALL timed_run(OrtSession* session, const OrtRunOptions* options, const char* const* input_names,
                                    const OrtValue* const* inputs, size_t num_inputs, const char* const* output_names,
                                    size_t num_outputs, OrtValue** outputs) noexcept {
  const auto start = Clock::now();
  OrtStatusPtr status = real_run(session, options, input_names, inputs, num_inputs, output_names, num_outputs, outputs);
  inside_run += Clock::now() - start;
  return status;
}

void install_timer() {
  timed_api = Ort::GetApi();
  real_run = timed_api.Run;
  timed_api.Run = timed_run;
  Ort::Global<void>::api_ = &timed_api;
}

double milliseconds(Clock::duration duration) { return std::chrono::duration<double, std::milli>(duration).count(); }

double resident_mib(const char* field = "VmRSS:") {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == field) {
      double kib = 0;
      status >> kib;
      return kib / 1024;
    }
  }
  return 0;
}

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

std::vector<TokenIds> prompts(std::size_t batch, std::int64_t vocab_size) {
  std::vector<TokenIds> rows(batch);
  for (std::size_t row = 0; row < batch; ++row) {
    for (std::int64_t i = 0; i < 16; ++i)
      rows[row].push_back((997 * i + 31 * static_cast<std::int64_t>(row) + 5) % vocab_size);
  }
  return rows;
}

void decode(const std::string& bundle, std::size_t batch, std::int64_t tokens) {
  install_timer();
  const chameleon::Runtime runtime(bundle, {.mode = chameleon::Mode::centroid});
  const auto rows = prompts(batch, runtime.manifest().model.vocab_size);
  std::vector<double> steps, outside;
  Clock::time_point last;
  const auto on_token = [&](const chameleon::Token& token) {
    if (token.row + 1 < batch) return true;
    const auto now = Clock::now();
    if (last != Clock::time_point()) {
      steps.push_back(milliseconds(now - last));
      outside.push_back(milliseconds(now - last - inside_run));
    }
    inside_run = {};
    last = now;
    return true;
  };
  runtime.stream(rows, on_token, {.max_new_tokens = tokens});
  std::cout << Json({{"batch", batch},
                     {"ms_per_step", median(steps)},
                     {"microseconds_outside_run", median(outside) * 1e3},
                     {"percent_outside_run", 100 * median(outside) / median(steps)}})
                   .dump()
            << std::endl;
}

void engine(const std::string& bundle, std::size_t rounds) {
  constexpr std::size_t kCallers = 8, kRequests = 3;
  constexpr std::int64_t kTokens = 64;
  install_timer();
  const chameleon::Runtime runtime(bundle, {.mode = chameleon::Mode::centroid});
  const auto rows = prompts(kCallers, runtime.manifest().model.vocab_size);
  std::vector<double> steps, outside, closed, offline;
  Clock::time_point last;
  chameleon::Engine engine(runtime, {.rows = kCallers, .observe = [&](const chameleon::Iteration& iteration) {
                                       const auto now = Clock::now();
                                       if (iteration.rows == kCallers && iteration.prefilled_tokens == 0) {
                                         steps.push_back(milliseconds(now - last));
                                         outside.push_back(milliseconds(now - last - inside_run));
                                       }
                                       inside_run = {};
                                       last = Clock::now();
                                     }});
  const auto per_second = [](std::size_t tokens, const auto& work) {
    const auto start = Clock::now();
    work();
    return static_cast<double>(tokens) * 1e3 / milliseconds(Clock::now() - start);
  };
  const chameleon::Generate generate{.max_new_tokens = kTokens, .sampling = chameleon::Sampling{.ignore_eos = true}};
  for (std::size_t round = 0; round < rounds; ++round) {
    offline.push_back(per_second(kCallers * kTokens, [&] { runtime.generate(rows, generate); }));
    closed.push_back(per_second(kCallers * kRequests * kTokens, [&] {
      std::vector<std::jthread> callers;
      for (const TokenIds& row : rows) {
        callers.emplace_back([&] {
          for (std::size_t request = 0; request < kRequests; ++request) {
            const chameleon::Stream stream = engine.submit(std::span(&row, 1), generate);
            while (stream.next()) {
            }
          }
        });
      }
    }));
  }
  engine.close();
  std::cout << Json({{"tokens_per_second", median(closed)},
                     {"tokens_per_second_of_generate", median(offline)},
                     {"ratio", median(closed) / median(offline)},
                     {"ms_per_step_of_8_rows", median(steps)},
                     {"microseconds_outside_run", median(outside) * 1e3}})
                   .dump()
            << std::endl;
}

void load(const std::string& bundle, bool map_weights) {
  const double before = resident_mib();
  const chameleon::Runtime runtime(bundle, {.mode = chameleon::Mode::centroid, .map_weights = map_weights});
  double weights = 0;
  for (const auto& [name, file] : runtime.manifest().files) weights += static_cast<double>(file.size) / (1 << 20);
  const double loaded = resident_mib();
  runtime.generate(prompts(1, runtime.manifest().model.vocab_size), {.max_new_tokens = 32});
  std::cout << Json({{"weights_mib", weights},
                     {"program_mib", before},
                     {"loaded_mib", loaded},
                     {"after_32_tokens_mib", resident_mib()},
                     {"ratio", resident_mib() / weights},
                     {"peak_mib", resident_mib("VmHWM:")}})
                   .dump()
            << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto word = [&](std::size_t i, const char* otherwise) { return i < words.size() ? words[i] : otherwise; };
  const std::string what = word(0, ""), bundle = word(1, "");
  if (what == "decode") {
    decode(bundle, std::stoul(word(2, "1")), std::stol(word(3, "64")));
  } else if (what == "engine") {
    engine(bundle, std::stoul(word(2, "7")));
  } else if (what == "load") {
    load(bundle, word(2, "packed") == "shared");
  } else {
    std::cerr << "usage: chameleon_bench decode|engine|load BUNDLE ...\n";
    return 2;
  }
  return 0;
}
