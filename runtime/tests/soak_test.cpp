// The soak itself: it finds each fault that it is for, and none where there is none.

#include "soak.h"

#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "shared_data.h"

namespace chameleon::test::soak_test {

namespace {

const std::vector<std::string> kSerial = {"0", "1", "2", "3", "4"};
constexpr std::size_t kThreads = 4, kRequests = 2000;

std::string faults(const std::function<Service()>& open) {
  // Of so much memory, 2 % is more than what a sanitizer keeps for itself.
  static const std::string ballast(64 << 20, 'x');
  std::string lines;
  for (const std::string& fault : soak(open, kSerial, kThreads, kRequests).faults()) lines += fault + "\n";
  return lines;
}

bool contains(const std::string& lines, const std::string& words) { return lines.find(words) != std::string::npos; }

std::string answer(std::size_t request) { return std::to_string(request); }

}  // namespace

TEST(Soak, FindsNothingInAServiceThatAnswers) {
  EXPECT_EQ(faults([] { return answer; }), "");
}

TEST(Soak, FindsAnAnswerThatDiffersOnce) {
  const auto open = [] {
    return [answered = std::make_shared<std::atomic<int>>()](std::size_t request) {
      return ++*answered == 1500 ? "?" : answer(request);
    };
  };
  EXPECT_EQ(faults(open), "1 answers differ from the serial ones\n");
}

TEST(Soak, FindsMemoryThatGrows) {
  const auto open = [] {
    return [mutex = std::make_shared<std::mutex>(),
            kept = std::make_shared<std::vector<std::string>>()](std::size_t request) {
      const std::scoped_lock lock(*mutex);
      kept->emplace_back(20'000, 'x');  // 20 MB in the second half
      return answer(request);
    };
  };
  EXPECT_TRUE(contains(faults(open), "over the second half"));
}

TEST(Soak, FindsWhatIsLeftOver) {
  std::vector<std::ifstream> files;
  std::vector<std::jthread> threads;
  std::vector<std::string> memory;
  const auto open = [&] {
    files.emplace_back("/proc/self/status");
    threads.emplace_back([](const std::stop_token& stop) {
      while (!stop.stop_requested()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    memory.emplace_back(20'000'000, 'x');
    return answer;
  };
  const std::string found = faults(open);
  EXPECT_TRUE(contains(found, "threads after close")) << found;
  EXPECT_TRUE(contains(found, "open files after close")) << found;
  EXPECT_TRUE(contains(found, "MiB allocated after close")) << found;
}

TEST(Soak, TinyRequestsAreAnsweredAsSerialOnes) {
  const TinyRequests requests(good_bundle("chameleon_masked"));
  const auto serial = requests.serial(100);
  EXPECT_GT(std::set(serial.begin(), serial.end()).size(), 20U);
  const auto report = soak([&] { return requests.open(); }, serial, 16, 500);
  EXPECT_EQ(report.wrong, 0U);
  EXPECT_EQ(report.after.threads, report.before.threads);
  EXPECT_EQ(report.after.files, report.before.files);
}

}  // namespace chameleon::test::soak_test
