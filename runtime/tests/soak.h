// A soak: many threads ask one service the same requests again and again. The Python counterpart is
// tests/runtime/soak.py.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "chameleon/engine.h"

namespace chameleon::test {

/// Answers a request, which its number says. When it is destroyed, it gives back all that it took.
using Service = std::function<std::string(std::size_t request)>;

/// What this process holds. Memory is what `malloc` has given out: what it keeps for later differs by chance.
struct Holdings {
  std::size_t threads = 0, files = 0;
  double allocated_mib = 0;
};

struct SoakReport {
  std::size_t requests = 0;
  std::size_t wrong = 0;  ///< answers that differ from the serial ones
  double ms_per_request = 0;
  std::vector<double> resident_mib{};  ///< after each tenth of the requests, without pages of files
  Holdings before{}, after{};          ///< before the service was opened, and after it was closed

  /// Growth of the resident memory over the second half of the requests: 0.01 is 1 %.
  [[nodiscard]] double drift() const;
  /// A sentence for everything that was promised and is not so: none if all is well.
  [[nodiscard]] std::vector<std::string> faults() const;
};

/// Send requests from many threads, which go round the serial answers.
/// open: starts a service. A first one answers each request once before anything is measured, since libraries keep
///     what they make for their first use
SoakReport soak(const std::function<Service()>& open, const std::vector<std::string>& serial, std::size_t threads,
                std::size_t requests);

/// Tiny requests of every mode on one runtime: of four requests three go to an engine and one to `generate`. A
/// tenth also leaves a stream that nobody reads, a tenth one that is cancelled.
class TinyRequests {
 public:
  explicit TinyRequests(std::filesystem::path bundle) : bundle_(std::move(bundle)) {}
  /// What `generate` answers to the first `count` requests, one at a time.
  [[nodiscard]] std::vector<std::string> serial(std::size_t count) const;
  [[nodiscard]] Service open() const;

 private:
  std::filesystem::path bundle_;
};

}  // namespace chameleon::test
