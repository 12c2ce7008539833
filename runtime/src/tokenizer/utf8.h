#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace chameleon {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

/// Offset of the first byte that is not UTF-8.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// The text with every maximal invalid part replaced by U+FFFD, as Unicode 16 section 3.9 recommends.
std::string replace_invalid_utf8(std::string_view bytes);

/// Append a code point as UTF-8.
void append_utf8(std::string& text, char32_t code_point);

/// The offset after the code point at `offset` of valid UTF-8.
std::size_t next_offset(std::string_view text, std::size_t offset);

/// The offset of the last code point of valid UTF-8, which is not empty.
std::size_t last_code_point(std::string_view text);

/// The number of code points of valid UTF-8.
std::size_t count_code_points(std::string_view text);

/// Bytes of the spaces (Unicode's White_Space) at the start, and at the end, of valid UTF-8.
std::size_t spaces_at_start(std::string_view text);
std::size_t spaces_at_end(std::string_view text);

/// The code point at `offset` of valid UTF-8. Moves `offset` to the next one.
char32_t next_code_point(std::string_view text, std::size_t& offset);

}  // namespace chameleon
