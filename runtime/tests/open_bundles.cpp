// Open and run the bundle of each line of standard input: see tests/open_bundles.py, which does the same in Python.

#include <fstream>
#include <iostream>
#include <string>

#include "chameleon/runtime.h"

namespace {

std::string outcome(const std::string& path) try {
  const chameleon::Runtime runtime(path, {.threads = 1});
  const std::vector<std::string> prompts = {"The river", "x"};
  chameleon::Adapt adapt;
  const auto size = static_cast<std::size_t>(runtime.manifest().adaptation.conditioning_size);
  const std::vector<float> ones(prompts.size() * size, 1);
  if (size > 0) adapt.conditioning = chameleon::Matrix{prompts.size(), size, ones};
  runtime.generate(prompts, {.max_new_tokens = 3}, adapt);
  if (runtime.manifest().encoder) adapt = {.adapt_text = "answer like a lawyer"};
  (void)runtime.score(prompts, adapt);
  return "ok";
} catch (const chameleon::Error& error) {
  return error.code();
} catch (const std::exception& error) {
  std::cerr << path << ": " << error.what() << std::endl;
  return "foreign:exception";
}

/// VmRSS, or VmHWM: the largest since the last write to clear_refs. In bytes.
long long resident(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) return 1024 * std::stoll(line.substr(field.size() + 1));
  }
  throw std::runtime_error("/proc/self/status has no " + field);
}

}  // namespace

int main() {
  for (std::string path; std::getline(std::cin, path);) {
    std::ofstream("/proc/self/clear_refs") << "5";
    const long long before = resident("VmRSS");
    const std::string code = outcome(path);
    std::cout << code << ' ' << resident("VmHWM") - before << std::endl;
  }
}
