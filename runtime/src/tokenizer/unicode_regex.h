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

  [[nodiscard]] std::string_view of(std::string_view text) const { return text.substr(start, end - start); }
};

/// A compiled PCRE2 pattern with Unicode properties. Immutable and thread-safe.
class Regex {
 public:
  /// Throws ManifestError for a pattern that PCRE2 does not compile.
  explicit Regex(std::string_view pattern);

  /// The first match at or after `start` in a subject of valid UTF-8. Throws InputError where PCRE2 gives up: it bounds
  /// its work.
  [[nodiscard]] std::optional<Span> search(std::string_view subject, std::size_t start = 0) const;

  /// Call `each(span, is_match)` for the matches and what is between them, in their order. No match may be empty.
  template <class Each>
  void for_each(std::string_view subject, const Each& each) const {
    std::size_t done = 0;
    while (const std::optional<Span> found = search(subject, done)) {
      if (done < found->start) each(Span{done, found->start}, false);
      each(*found, true);
      done = found->end;
    }
    if (done < subject.size()) each(Span{done, subject.size()}, false);
  }

 private:
  std::shared_ptr<pcre2_real_code_8> code_;
};

}  // namespace chameleon
