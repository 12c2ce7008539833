#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace chameleon {

/// Byte-pair encoding on token ids.
class Bpe {
 public:
  struct Merge {
    std::int32_t left;
    std::int32_t right;
    std::int32_t merged;
  };
  /// byte_ids: the token of every single byte, or -1; merges: in order of priority, highest first.
  Bpe(const std::array<std::int32_t, 256>& byte_ids, const std::vector<Merge>& merges);

  /// Append the token ids of one word. Bytes without a token are skipped, as in `tokenizers`.
  void encode(std::string_view word, std::vector<std::int64_t>& ids) const;

 private:
  struct Target {
    std::int32_t rank;
    std::int32_t id;
  };
  [[nodiscard]] const Target* find(std::int32_t left, std::int32_t right) const;

  std::array<std::int32_t, 256> byte_ids_;
  std::unordered_map<std::uint64_t, Target> merges_;
};

}  // namespace chameleon
