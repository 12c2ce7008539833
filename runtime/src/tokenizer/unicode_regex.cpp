#include "tokenizer/unicode_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <string>

#include "chameleon/error.h"

namespace chameleon {

Regex::Regex(std::string_view pattern) {
  int problem = 0;
  PCRE2_SIZE offset = 0;
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                            PCRE2_UTF | PCRE2_UCP | PCRE2_ALT_EXTENDED_CLASS, &problem, &offset, nullptr),
              pcre2_code_free);
  if (!code_) throw ManifestError("tokenizer.json: a pattern does not compile at " + std::to_string(offset));
  pcre2_jit_compile(code_.get(),
                    PCRE2_JIT_COMPLETE);  // if it fails, matching is interpreted: slower, with the same results
}

std::optional<Span> Regex::search(std::string_view subject, std::size_t start) const {
  // One per thread: a match writes into it, and allocating it costs more than most matches.
  struct Free {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  thread_local const std::unique_ptr<pcre2_match_data, Free> found(pcre2_match_data_create(1, nullptr));
  // The callers have checked the text; checking it again for every match would take quadratic time.
  const int count = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(subject.data()), subject.size(), start,
                                PCRE2_NO_UTF_CHECK, found.get(), nullptr);
  if (count == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (count < 0) throw InputError("the text cannot be split into words: PCRE2 error " + std::to_string(count));
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(found.get());
  return Span{offsets[0], offsets[1]};
}

}  // namespace chameleon
