#include "soak.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <fstream>
#include <memory>
#include <sstream>
#include <thread>

// Defined where a sanitizer is linked. GCC installs no header that declares it.
extern "C" [[gnu::weak]] std::size_t __sanitizer_get_current_allocated_bytes();

namespace chameleon::test {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kParts = 10;
constexpr double kMaxDrift = 0.02, kMaxLeftMib = 0.1;

/// Without pages of files, which the kernel takes back as it likes. /proc/self/status has it too, but lags behind by up
/// to 64 pages for each thread.
double resident_mib() {
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string word; rollup >> word;) {
    if (word == "Anonymous:") {
      double kib = 0;
      rollup >> kib;
      return kib / 1024;
    }
  }
  throw std::runtime_error("/proc/self/smaps_rollup has no Anonymous");
}

std::size_t entries(const char* directory) {
  const std::filesystem::directory_iterator found(directory);
  return static_cast<std::size_t>(std::distance(begin(found), end(found)));
}

double allocated_mib() {
  const struct mallinfo2 given = mallinfo2();
  const std::size_t bytes = __sanitizer_get_current_allocated_bytes != nullptr
                                ? __sanitizer_get_current_allocated_bytes()
                                : given.uordblks + given.hblkhd;
  return static_cast<double>(bytes) / (1 << 20);
}

Holdings holdings() { return {entries("/proc/self/task"), entries("/proc/self/fd"), allocated_mib()}; }

/// The kernel removes a thread that was joined a moment later.
Holdings holdings_without_threads_beyond(std::size_t threads) {
  for (const auto end = Clock::now() + std::chrono::seconds(2);
       entries("/proc/self/task") > threads && Clock::now() < end;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return holdings();
}

std::size_t wrong_answers(const Service& service, const std::vector<std::string>& serial, std::size_t threads,
                          std::size_t requests, const std::function<void(std::size_t)>& answered) {
  std::atomic<std::size_t> next = 0, done = 0, wrong = 0;
  std::barrier end(static_cast<std::ptrdiff_t>(threads));  // the last answer finds the stacks of all threads
  std::vector<std::jthread> pool;
  for (std::size_t i = 0; i < threads; ++i) {
    pool.emplace_back([&] {
      for (std::size_t request = next++; request < requests; request = next++) {
        const std::size_t number = request % serial.size();
        if (service(number) != serial[number]) ++wrong;
        answered(++done);
      }
      end.arrive_and_wait();
    });
  }
  pool.clear();
  return wrong;
}

struct Request {
  std::vector<TokenIds> rows;
  Generate generate;
  Adapt adapt;
  std::size_t number;
};

Request tiny_request(std::size_t number, std::int64_t vocab_size) {
  static constexpr Mode kModes[] = {Mode::none, Mode::centroid, Mode::request, Mode::cohort, Mode::tenant};
  Request request{.rows = std::vector<TokenIds>(number % 10 == 9 ? 2 : 1),
                  .generate = {.max_new_tokens = 1 + static_cast<std::int64_t>(number % 3),
                               .sampling = Sampling{.temperature = number % 2 == 0 ? 0.0 : 1.0, .seed = number}},
                  .adapt = {.mode = kModes[number % 5]},
                  .number = number};
  if (request.adapt.mode == Mode::tenant) request.adapt.tenants.emplace(request.rows.size(), "a");
  for (std::size_t row = 0; row < request.rows.size(); ++row) {
    for (std::size_t i = 0; i < 1 + number % 7; ++i) {
      const std::size_t id = number * 31 + row * 17 + i * (5 + number % 11);
      request.rows[row].push_back(1 + static_cast<std::int64_t>(id) % (vocab_size - 1));
    }
  }
  return request;
}

std::string texts(const std::vector<Generation>& generations) {
  std::string all;
  for (const Generation& generation : generations) all += generation.text + '\0';
  return all;
}

std::string generate(const Runtime& runtime, const Request& request) {
  return texts(runtime.generate(request.rows, request.generate, request.adapt));
}

std::string submit(Engine& engine, const Request& request) {
  const auto& [rows, generate, adapt, number] = request;
  if (number % 10 == 4) (void)engine.submit(rows, generate, adapt);  // nobody reads it
  if (number % 10 == 5) engine.submit(rows, generate, adapt).cancel();
  return texts(engine.submit(rows, generate, adapt).result());
}

}  // namespace

double SoakReport::drift() const { return resident_mib.back() / resident_mib[kParts / 2 - 1] - 1; }

std::vector<std::string> SoakReport::faults() const {
  std::vector<std::string> found;
  const auto expect = [&](bool condition, const auto&... words) {
    std::ostringstream sentence;
    (sentence << ... << words);
    if (!condition) found.push_back(sentence.str());
  };
  expect(wrong == 0, wrong, " answers differ from the serial ones");
  expect(drift() < kMaxDrift, "resident memory grows by ", 100 * drift(), " % over the second half");
  expect(after.threads <= before.threads, after.threads, " threads after close, ", before.threads, " before");
  expect(after.files <= before.files, after.files, " open files after close, ", before.files, " before");
  expect(after.allocated_mib - before.allocated_mib < std::max(kMaxLeftMib, kMaxDrift * before.allocated_mib),
         after.allocated_mib, " MiB allocated after close, ", before.allocated_mib, " before");
  return found;
}

SoakReport soak(const std::function<Service()>& open, const std::vector<std::string>& serial, std::size_t threads,
                std::size_t requests) {
  wrong_answers(open(), serial, threads, serial.size(), [](std::size_t) {});
  SoakReport report{.requests = requests, .resident_mib = std::vector<double>(kParts)};
  report.before = holdings();
  const auto start = Clock::now();
  report.wrong = wrong_answers(open(), serial, threads, requests, [&](std::size_t done) {
    const std::size_t part = done * kParts / requests;
    if (part > (done - 1) * kParts / requests) report.resident_mib[part - 1] = resident_mib();
  });
  report.ms_per_request =
      std::chrono::duration<double, std::milli>(Clock::now() - start).count() / static_cast<double>(requests);
  report.after = holdings_without_threads_beyond(report.before.threads);
  return report;
}

std::vector<std::string> TinyRequests::serial(std::size_t count) const {
  const Runtime runtime(bundle_, {.threads = 1});
  std::vector<std::string> answers;
  for (std::size_t number = 0; number < count; ++number)
    answers.push_back(generate(runtime, tiny_request(number, runtime.manifest().model.vocab_size)));
  return answers;
}

Service TinyRequests::open() const {
  struct Opened {
    explicit Opened(const std::filesystem::path& bundle)
        : runtime(bundle, {.threads = 1}), engine(runtime, {.max_waiting = 2000}) {}
    Runtime runtime;
    Engine engine;
  };
  return [opened = std::make_shared<Opened>(bundle_)](std::size_t number) {
    const Request request = tiny_request(number, opened->runtime.manifest().model.vocab_size);
    return number % 4 == 3 ? generate(opened->runtime, request) : submit(opened->engine, request);
  };
}

}  // namespace chameleon::test
