// The regular expressions of a tokenizer.json: the counterpart of chameleon_deploy/runtime/tokenizer_pattern.py.
#pragma once

#include <string>
#include <string_view>

namespace chameleon {

/// Translate a regular expression for PCRE2: of equal meaning as in Oniguruma, which `tokenizers` matches with, and of
/// bounded work. Throws ManifestError for one that is not taken; the Python file says which are.
std::string translate_pattern(std::string_view pattern);

/// The PCRE2 pattern that matches a text itself.
std::string literal_pattern(std::string_view text);

}  // namespace chameleon
