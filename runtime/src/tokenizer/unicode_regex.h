#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string_view>

struct pcre2_real_code_8;

namespace chameleon {

struct Span {
  std::size_t start;
  std::size_t end;
};

/// A compiled PCRE2 pattern with Unicode properties. Immutable and thread-safe.
class Regex {
 public:
  explicit Regex(std::string_view pattern);

  /// The first match at or after `start` in a subject of valid UTF-8.
  [[nodiscard]] std::optional<Span> search(std::string_view subject, std::size_t start = 0) const;

 private:
  std::shared_ptr<pcre2_real_code_8> code_;
};

}  // namespace chameleon
