#include "tokenizer/utf8.h"

#include <algorithm>

namespace chameleon {

namespace {

struct FrontPart {
  std::size_t length;
  bool valid;
};

/// The first character, or the longest prefix of one that could still become valid.
FrontPart front_part(std::string_view text) {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // After four lead bytes the second byte has a narrower range: no overlong forms, no surrogates, nothing over
  // U+10FFFF.
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (std::size_t i = 1; i < length; ++i) {
    const bool fits = i < text.size() && at(i) >= (i == 1 ? low : 0x80) && at(i) <= (i == 1 ? high : 0xBF);
    if (!fits) return {i, false};
  }
  return {length, true};
}

bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

bool is_white_space(char32_t c) {
  return c == ' ' || (c >= 0x9 && c <= 0xD) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace

std::optional<std::size_t> find_invalid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const FrontPart part = front_part(text.substr(i));
    if (!part.valid) return i;
    i += part.length;
  }
  return std::nullopt;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  for (std::size_t i = 0; i < bytes.size();) {
    const FrontPart part = front_part(bytes.substr(i));
    text += part.valid ? bytes.substr(i, part.length) : kReplacement;
    i += part.length;
  }
  return text;
}

void append_utf8(std::string& text, char32_t code_point) {
  if (code_point < 0x80) {
    text += static_cast<char>(code_point);
    return;
  }
  const int more = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  const int lead = more == 1 ? 0xC0 : more == 2 ? 0xE0 : 0xF0;
  text += static_cast<char>(lead | (code_point >> (6 * more)));
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | ((code_point >> (6 * i)) & 0x3F));
}

std::size_t next_offset(std::string_view text, std::size_t offset) {
  do {
    ++offset;
  } while (offset < text.size() && is_continuation(text[offset]));
  return offset;
}

std::size_t last_code_point(std::string_view text) {
  std::size_t offset = text.size() - 1;
  while (offset > 0 && is_continuation(text[offset])) --offset;
  return offset;
}

std::size_t count_code_points(std::string_view text) {
  return text.size() - static_cast<std::size_t>(std::ranges::count_if(text, is_continuation));
}

std::size_t spaces_at_start(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t next = 0; next < text.size() && is_white_space(next_code_point(text, next));) end = next;
  return end;
}

std::size_t spaces_at_end(std::string_view text) {
  std::size_t start = text.size();
  while (start > 0) {
    std::size_t last = last_code_point(text.substr(0, start));
    const std::size_t before = last;
    if (!is_white_space(next_code_point(text, last))) break;
    start = before;
  }
  return text.size() - start;
}

char32_t next_code_point(std::string_view text, std::size_t& offset) {
  const auto lead = static_cast<unsigned char>(text[offset]);
  const std::size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code_point = length == 1 ? lead : lead & (0x7F >> length);
  for (std::size_t i = 1; i < length; ++i) {
    code_point = (code_point << 6) | (static_cast<unsigned char>(text[offset + i]) & 0x3F);
  }
  offset += length;
  return code_point;
}

}  // namespace chameleon
