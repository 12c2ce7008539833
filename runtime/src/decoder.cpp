#include "decoder.h"

#include <algorithm>

namespace chameleon {

std::vector<std::span<const std::int64_t>> without_last(Rows rows) {
  std::vector<std::span<const std::int64_t>> inputs;
  for (const auto& row : rows) inputs.push_back(row.first(row.size() - 1));
  return inputs;
}

std::size_t part_size(Rows rows, std::size_t tokens) {
  std::size_t width = 0;
  for (std::size_t count = 0; count < rows.size(); ++count) {
    width = std::max(width, rows[count].size());
    if (count > 0 && (count + 1) * width > tokens) return count;
  }
  return rows.size();
}

}  // namespace chameleon
