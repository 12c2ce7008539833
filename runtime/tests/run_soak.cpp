// `chameleon_soak BUNDLE [--threads 64] [--requests 1000000]`: tiny requests from many threads, whose answers must be
// those of serial requests, without memory that grows or anything left over. Prints one line of JSON. The exit code is
// 1 where something is not so, which standard error says.

#include <algorithm>
#include <iostream>

#include "shared_data.h"
#include "soak.h"

namespace {

constexpr std::size_t kDistinct = 1000;

std::size_t option(const std::vector<std::string>& words, const std::string& name, std::size_t otherwise) {
  const auto found = std::ranges::find(words, name);
  return found == words.end() || found + 1 == words.end() ? otherwise : std::stoul(*(found + 1));
}

chameleon::test::Json json(const chameleon::test::Holdings& held) {
  return {{"threads", held.threads}, {"files", held.files}, {"allocated_mib", held.allocated_mib}};
}

int run(const std::vector<std::string>& words) {
  const chameleon::test::TinyRequests requests(words.at(0));
  const auto report = chameleon::test::soak([&] { return requests.open(); }, requests.serial(kDistinct),
                                            option(words, "--threads", 64), option(words, "--requests", 1'000'000));
  const auto faults = report.faults();
  for (const std::string& fault : faults) std::cerr << "error: " << fault << "\n";
  std::cout << chameleon::test::Json({{"requests", report.requests},
                                      {"wrong", report.wrong},
                                      {"ms_per_request", report.ms_per_request},
                                      {"resident_mib", report.resident_mib},
                                      {"drift", report.drift()},
                                      {"before", json(report.before)},
                                      {"after", json(report.after)}})
                   .dump()
            << std::endl;
  return faults.empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: chameleon_soak BUNDLE [--threads 64] [--requests 1000000]\n";
    return 2;
  }
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
