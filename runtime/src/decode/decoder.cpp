#include "decode/decoder.h"

#include <algorithm>
#include <numeric>

namespace chameleon {

std::vector<std::span<const std::int64_t>> without_last(Rows rows) {
  std::vector<std::span<const std::int64_t>> inputs;
  for (const auto& row : rows) inputs.push_back(row.first(row.size() - 1));
  return inputs;
}

std::vector<std::size_t> Part::indices() const {
  std::vector<std::size_t> rows(count);
  std::iota(rows.begin(), rows.end(), first);
  return rows;
}

std::vector<Part> parts(Rows rows, std::size_t tokens, std::size_t max_rows, std::span<const std::int64_t> starts) {
  const auto is_alone = [&](std::size_t row) { return !starts.empty() && starts[row] > 0; };
  std::vector<Part> result;
  std::size_t width = 0;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    width = std::max(width, rows[row].size());
    const std::size_t count = result.empty() ? 0 : result.back().count;
    if (count == 0 || count == max_rows || (count + 1) * width > tokens || is_alone(row) || is_alone(row - 1)) {
      result.push_back({row, 1});
      width = rows[row].size();
    } else {
      ++result.back().count;
    }
  }
  return result;
}

}  // namespace chameleon
