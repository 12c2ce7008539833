#include "tokenizer/normalizers.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

// `tokenizers` normalises by the tables of Unicode 9, in which these characters neither decompose, combine nor have an
// order; utf8proc knows them.
constexpr std::string_view kNewer =
    "["
    R"(\x{7FD}\x{898}-\x{89F}\x{8CA}-\x{8D3}\x{9FE}\x{C3C}\x{D3B}-\x{D3C}\x{EBA}\x{1715}\x{1ABF}-\x{1ACE})"
    R"(\x{1DF6}-\x{1DFA}\x{32FF}\x{A7F2}-\x{A7F4}\x{A82C}\x{AB69}\x{10781}-\x{10785}\x{10787}-\x{107B0})"
    R"(\x{107B2}-\x{107BA}\x{10D24}-\x{10D27}\x{10EAB}-\x{10EAC}\x{10EFD}-\x{10EFF}\x{10F46}-\x{10F50})"
    R"(\x{10F82}-\x{10F85}\x{11070}\x{1133B}\x{1145E}\x{11839}-\x{1183A}\x{11930}\x{11935}\x{11938})"
    R"(\x{1193D}-\x{1193E}\x{11943}\x{119E0}\x{11A34}\x{11A47}\x{11A99}\x{11D42}\x{11D44}-\x{11D45})"
    R"(\x{11D97}\x{11F41}-\x{11F42}\x{16FF0}-\x{16FF1}\x{1E030}-\x{1E06D}\x{1E08F}\x{1E130}-\x{1E136})"
    R"(\x{1E2AE}\x{1E2EC}-\x{1E2EF}\x{1E4EC}-\x{1E4EF}\x{1F16C}\x{1FBF0}-\x{1FBF9})"
    "]";

// BertNormalizer follows the categories of Unicode 8: without these format characters and nonspacing marks, and with
// two more marks.
constexpr std::string_view kControl =
    R"(\x{FFFD}|(?![\t\n\r\x{890}\x{891}\x{8E2}\x{110CD}\x{13430}-\x{1343F}])[\p{Cc}\p{Cf}\p{Co}])";
constexpr std::string_view kMark =
    R"([\x{1734}\x{1171E}]|(?![)"
    R"(\x{7FD}\x{897}-\x{89F}\x{8CA}-\x{8E1}\x{9FE}\x{AFA}-\x{AFF}\x{B55}\x{C04}\x{C3C}\x{D00})"
    R"(\x{D3B}-\x{D3C}\x{D81}\x{EBA}\x{ECE}\x{180F}\x{1885}-\x{1886}\x{1ABF}-\x{1ACE}\x{1DF6}-\x{1DFB})"
    R"(\x{A82C}\x{A8C5}\x{A8FF}\x{A9BD}\x{10D24}-\x{10D27}\x{10D69}-\x{10D6D}\x{10EAB}-\x{10EAC})"
    R"(\x{10EFC}-\x{10EFF}\x{10F46}-\x{10F50}\x{10F82}-\x{10F85}\x{11070}\x{11073}-\x{11074}\x{110C2})"
    R"(\x{111C9}\x{111CF}\x{1123E}\x{11241}\x{1133B}\x{113BB}-\x{113C0}\x{113CE}\x{113D0}\x{113D2})"
    R"(\x{113E1}-\x{113E2}\x{11438}-\x{1143F}\x{11442}-\x{11444}\x{11446}\x{1145E}\x{1182F}-\x{11837})"
    R"(\x{11839}-\x{1183A}\x{1193B}-\x{1193C}\x{1193E}\x{11943}\x{119D4}-\x{119D7}\x{119DA}-\x{119DB})"
    R"(\x{119E0}\x{11A01}-\x{11A0A}\x{11A33}-\x{11A38}\x{11A3B}-\x{11A3E}\x{11A47}\x{11A51}-\x{11A56})"
    R"(\x{11A59}-\x{11A5B}\x{11A8A}-\x{11A96}\x{11A98}-\x{11A99}\x{11C30}-\x{11C36}\x{11C38}-\x{11C3D})"
    R"(\x{11C3F}\x{11C92}-\x{11CA7}\x{11CAA}-\x{11CB0}\x{11CB2}-\x{11CB3}\x{11CB5}-\x{11CB6})"
    R"(\x{11D31}-\x{11D36}\x{11D3A}\x{11D3C}-\x{11D3D}\x{11D3F}-\x{11D45}\x{11D47}\x{11D90}-\x{11D91})"
    R"(\x{11D95}\x{11D97}\x{11EF3}-\x{11EF4}\x{11F00}-\x{11F01}\x{11F36}-\x{11F3A}\x{11F40}\x{11F42})"
    R"(\x{11F5A}\x{13440}\x{13447}-\x{13455}\x{1611E}-\x{16129}\x{1612D}-\x{1612F}\x{16F4F}\x{16FE4})"
    R"(\x{1CF00}-\x{1CF2D}\x{1CF30}-\x{1CF46}\x{1E000}-\x{1E006}\x{1E008}-\x{1E018}\x{1E01B}-\x{1E021})"
    R"(\x{1E023}-\x{1E024}\x{1E026}-\x{1E02A}\x{1E08F}\x{1E130}-\x{1E136}\x{1E2AE}\x{1E2EC}-\x{1E2EF})"
    R"(\x{1E4EC}-\x{1E4EF}\x{1E5EE}-\x{1E5EF}\x{1E944}-\x{1E94A})"
    R"(])\p{Mn})";
constexpr std::string_view kChinese =
    R"([\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B81F}\x{2B920}-\x{2CEAF}\x{F900}-\x{FAFF})"
    R"(\x{2F800}-\x{2FA1F}])";

/// The normal form of text without newer characters.
std::string utf8proc_form(std::string_view text, int options) {
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &mapped, static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
  if (size < 0) throw InputError(std::string("the text cannot be normalised: ") + utf8proc_errmsg(size));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, std::free);
  return {reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(size)};
}

std::string normal_form(std::string_view text, int options) {
  static const Regex newer(kNewer);
  const auto is_ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  if (std::ranges::all_of(text, is_ascii)) return std::string(text);
  std::string form;
  newer.for_each(text, [&](Span span, bool is_newer) {
    form += is_newer ? std::string(span.of(text)) : utf8proc_form(span.of(text), options);
  });
  return form;
}

/// Replace every match by what `each` gives for it.
template <class Each>
std::string replace_matches(const Regex& pattern, std::string_view text, const Each& each) {
  std::string replaced;
  pattern.for_each(text, [&](Span span, bool is_match) {
    is_match ? replaced.append(each(span.of(text))) : replaced.append(span.of(text));
  });
  return replaced;
}

/// Append the lower case of a character, by Unicode 17 as Rust has it: utf8proc has that of Unicode 15.
void append_lower(std::string& text, char32_t c) {
  if (c == 0x130) {
    text += "i\u0307";
    return;
  }
  char32_t lower = static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
  if (c == 0x1C89 || c == 0xA7CC || c == 0xA7CE || c == 0xA7D2 || c == 0xA7D4 || c == 0xA7DA) lower = c + 1;
  if (c == 0xA7CB) lower = 0x264;
  if (c == 0xA7DC) lower = 0x19B;
  if (c >= 0x10D50 && c <= 0x10D65) lower = c + 0x20;
  if (c >= 0x16EA0 && c <= 0x16EB8) lower = c + 0x1B;
  append_utf8(text, lower);
}

std::string apply(const Nfc& form, std::string text) {
  return normal_form(text, UTF8PROC_COMPOSE | (form.compatibility ? UTF8PROC_COMPAT : 0));
}

std::string apply(const Prepend& prepend, std::string text) { return text.empty() ? text : prepend.prefix + text; }

std::string apply(const Replace& replace, std::string text) { return replace(text); }

std::string apply(const Strip& strip, std::string text) {
  if (strip.left) text.erase(0, spaces_at_start(text));
  if (strip.right) text.resize(text.size() - spaces_at_end(text));
  return text;
}

std::string apply(const BertNormalizer& bert, std::string text) {
  static const Regex control(kControl), space(R"(\p{White_Space})"), chinese(kChinese), mark(kMark);
  if (bert.clean_text) {
    text = replace_matches(control, text, [](std::string_view) { return ""; });
    text = replace_matches(space, text, [](std::string_view) { return " "; });
  }
  if (bert.handle_chinese_chars) {
    text = replace_matches(chinese, text, [](std::string_view c) { return ' ' + std::string(c) + ' '; });
  }
  if (bert.strip_accents) {
    text = replace_matches(mark, normal_form(text, UTF8PROC_DECOMPOSE), [](std::string_view) { return ""; });
  }
  if (bert.lowercase) {
    std::string lower;
    for (std::size_t at = 0; at < text.size();) append_lower(lower, next_code_point(text, at));
    text = std::move(lower);
  }
  return text;
}

}  // namespace

std::string Replace::operator()(std::string_view text) const {
  return replace_matches(pattern, text, [&](std::string_view) -> const std::string& { return content; });
}

std::string normalize(const std::vector<Normalizer>& normalizers, std::string_view text) {
  std::string normal(text);
  for (const Normalizer& normalizer : normalizers) {
    normal = std::visit([&](const auto& step) { return apply(step, std::move(normal)); }, normalizer);
  }
  return normal;
}

}  // namespace chameleon
