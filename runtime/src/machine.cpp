#include "machine.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace chameleon {

namespace {

/// The number after a name in a file of "NAME NUMBER" lines; a name may end in a colon.
std::optional<std::size_t> number_of(const std::string& file, const std::string& name) {
  std::ifstream stream(file);
  for (std::string word; stream >> word;) {
    std::size_t number = 0;
    if (word == name && stream >> number) return number;
  }
  return std::nullopt;
}

/// The number that a file holds; none for "max".
std::optional<std::size_t> number_in(const std::string& file) {
  std::ifstream stream(file);
  std::size_t number = 0;
  return stream >> number ? std::optional(number) : std::nullopt;
}

/// What a control group leaves, at least one byte; none without a limit.
std::optional<std::size_t> left_in_group(const std::string& directory, const char* limit_file, const char* used_file) {
  const auto limit = number_in(directory + limit_file), used = number_in(directory + used_file);
  if (!limit || !used) return std::nullopt;
  const std::size_t inactive = number_of(directory + "memory.stat", "inactive_file").value_or(0);
  const std::size_t taken = *used - std::min(*used, inactive);
  return *limit > taken ? *limit - taken : 1;
}

}  // namespace

std::optional<std::size_t> free_memory() {
  auto free = number_of("/proc/meminfo", "MemAvailable:");
  if (!free) return std::nullopt;
  *free *= 1024;
  const std::string root = "/sys/fs/cgroup/";  // of versions 2 and 1
  for (const auto& left : {left_in_group(root, "memory.max", "memory.current"),
                           left_in_group(root + "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes")}) {
    if (left) free = std::min(*free, *left);
  }
  return free;
}

}  // namespace chameleon
