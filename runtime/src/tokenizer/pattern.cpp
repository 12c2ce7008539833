#include "tokenizer/pattern.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <vector>

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

constexpr std::size_t kMaxLength = 1024;  // characters of a pattern
constexpr std::uint64_t kMaxGroup = 3;    // repetitions of a group: PCRE2 copies it
constexpr double kMaxWays = 1000;         // in which the bounded part of an alternative can match at one place
constexpr std::uint64_t kUnbounded = std::uint64_t{1} << 32;
constexpr std::array kCategories = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd",
                                    "Nl", "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm",
                                    "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co", "Cn"};
constexpr std::array kScripts = {"Arabic", "Cyrillic", "Devanagari", "Greek", "Han",
                                 "Hangul", "Hiragana", "Katakana",   "Latin", "Thai"};
// Where case is ignored: escapes, and letters of which Oniguruma takes two for one character, as in U+00DF.
constexpr std::array kFolds = {"\\", "ff", "fi", "fl", "ss", "st"};

/// A part of an alternative. atom: what is repeated, as it stands in the pattern; ways: in which it can match at one
/// place, if `most` is bounded.
struct Item {
  std::string_view atom;
  std::uint64_t least = 1;
  std::uint64_t most = 1;
  double ways = 1;
  bool is_ahead = false;

  [[nodiscard]] bool is_obligatory() const { return is_ahead || least > 0; }
};

using Items = std::vector<Item>;

double ways_of(const Items& items) {
  double ways = 1;
  for (const Item& item : items) ways *= item.ways;
  return ways;
}

std::size_t first_unbounded(const Items& items) {
  const auto found = std::ranges::find(items, kUnbounded, &Item::most);
  return static_cast<std::size_t>(found - items.begin());
}

bool is_ascii_digit(char c) { return c >= '0' && c <= '9'; }
bool is_hex_digit(char c) { return is_ascii_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
bool is_ascii_punctuation(char32_t c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

std::string escaped(char32_t character) {
  char text[16];
  (void)std::snprintf(text, sizeof text, "\\x{%X}", static_cast<unsigned>(character));
  return text;
}

/// Reads one pattern from the left and writes the same for PCRE2. Throws ManifestError where it is not taken.
class Translator {
 public:
  explicit Translator(std::string_view text) : text_(text) {}

  std::string translate() {
    const auto is_lead = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; };
    if (std::ranges::count_if(text_, is_lead) > static_cast<std::ptrdiff_t>(kMaxLength)) {
      fail("is longer than " + std::to_string(kMaxLength) + " characters");
    }
    const std::vector<Items> alternatives = read_alternatives(false, false);
    if (at_ < text_.size()) fail("has a parenthesis too many");
    for (std::size_t i = 0; i < alternatives.size(); ++i) {
      const auto reads = [](const Item& item) { return item.least > 0 && !item.is_ahead; };
      if (std::ranges::none_of(alternatives[i], reads)) fail("matches the empty text");
      check_work(alternatives[i], i + 1 < alternatives.size() ? alternatives[i + 1] : Items{});
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const {
    throw ManifestError("pattern '" + std::string(text_.substr(0, 200)) + "' " + problem + " at byte " +
                        std::to_string(at_));
  }

  [[nodiscard]] bool peek(std::string_view text) const { return text_.substr(at_).starts_with(text); }
  [[nodiscard]] bool peek_any(std::string_view characters) const {
    return at_ < text_.size() && characters.find(text_[at_]) != std::string_view::npos;
  }

  bool take(std::string_view text) {
    const bool found = peek(text);
    if (found) at_ += text.size();
    return found;
  }

  char32_t character() {
    if (at_ >= text_.size()) fail("ends too early");
    return next_code_point(text_, at_);
  }

  std::vector<Items> read_alternatives(bool is_group, bool ignores_case) {
    std::vector<Items> alternatives(1);
    while (at_ < text_.size() && !peek(")")) {
      if (take("|")) {
        out_ += '|';
        alternatives.emplace_back();
      } else {
        alternatives.back().push_back(read_item(is_group));
      }
    }
    for (const Items& items : alternatives) {
      if (items.empty()) fail("has an empty alternative");
    }
    for (const Items& items : alternatives) {
      if (ways_of(items) > kMaxWays) fail("has an alternative that can match in more than 1000 ways");
      if (!ignores_case) continue;
      std::string letters;
      for (const Item& item : items) letters += item.atom;
      const bool is_ascii = std::ranges::all_of(letters, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
      for (char& c : letters) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
      const auto is_part = [&](const char* part) { return letters.find(part) != std::string::npos; };
      if (!is_ascii || std::ranges::any_of(kFolds, is_part)) fail("ignores case where one letter can mean two");
    }
    return alternatives;
  }

  Item read_item(bool is_group) {
    const std::size_t start = at_;
    for (const char* ahead : {"(?!", "(?="}) {
      if (is_group || !take(ahead)) continue;
      out_ += ahead;
      read_single();
      if (!take(")")) fail("looks ahead at more than one character");
      out_ += ')';
      if (at_ < text_.size() && !peek("|")) fail("goes on after looking ahead");
      return {text_.substr(start, at_ - start), 1, 1, 1, true};
    }
    double ways = 1;
    if (take("(")) {
      if (is_group) fail("has a group in a group");
      const bool ignores_case = take("?i:");
      if (!ignores_case && !take("?:") && peek("?")) fail("has an unknown kind of group");
      out_ += ignores_case ? "(?i:" : "(?:";
      ways = 0;
      for (const Items& items : read_alternatives(true, ignores_case)) ways += ways_of(items);
      if (!take(")")) fail("has an open group");
      out_ += ')';
    } else {
      read_single();
    }
    const std::string_view atom = text_.substr(start, at_ - start);
    Item item{atom};
    read_repetition(item);
    if (item.most > kMaxGroup && (is_group || atom.starts_with('('))) {
      fail("repeats a group, or in a group, more than 3 times");
    }
    if (item.most != kUnbounded) {
      const auto choices = static_cast<double>(item.most - item.least + 1);
      item.ways = choices * std::pow(ways, static_cast<double>(item.most));
    }
    return item;
  }

  void read_repetition(Item& item) {
    const std::size_t start = at_;
    if (take("{")) {
      item.least = item.most = read_number();
      if (take(",")) item.most = peek("}") ? kUnbounded : read_number();
      if (!take("}") || item.most < 1 || item.least > item.most) fail("has an unknown repetition");
    } else if (take("?") || take("*") || take("+")) {
      const char sign = text_[start];
      item.least = sign == '+' ? 1 : 0;
      item.most = sign == '?' ? 1 : kUnbounded;
      (void)take("+");  // possessive
    }
    out_ += text_.substr(start, at_ - start);
    if (peek_any("?*+{")) fail("repeats a repetition, or is lazy");
  }

  std::uint64_t read_number() {
    std::uint64_t number = 0;
    std::size_t digits = 0;
    for (; at_ < text_.size() && is_ascii_digit(text_[at_]) && digits < 5; ++at_, ++digits) {
      number = number * 10 + static_cast<std::uint64_t>(text_[at_] - '0');
    }
    if (digits < 1 || digits > 4) fail("has an unknown repetition");
    return number;
  }

  /// Read what matches one character: a character, an escape or a class.
  void read_single() {
    if (take("[")) return read_class(false);
    if (take("\\")) {
      (void)read_escape(out_);
    } else if (take(".")) {
      out_ += "[^\\n]";
    } else {
      if (peek_any("^$|?*+(){}]")) fail(std::string("has '") + text_[at_] + "', which is not taken here,");
      out_ += escaped(character());
    }
  }

  /// Write what an escape means. Returns the character, or nothing for an escape that means several.
  std::optional<char32_t> read_escape(std::string& out) {
    const char32_t kind = character();
    std::optional<char32_t> meant;
    if (kind == 'r') meant = '\r';
    if (kind == 'n') meant = '\n';
    if (kind == 't') meant = '\t';
    if (kind == 'f') meant = '\f';
    if (is_ascii_punctuation(kind)) meant = kind;
    if (kind == 'u') meant = read_code_point(4, 4);
    if (kind == 'x' && take("{")) {
      meant = read_code_point(1, 6);
      if (!take("}")) fail("has an unknown escape");
    }
    if (meant) {
      out += escaped(*meant);
    } else if (kind == 's' || kind == 'S') {  // PCRE2's \s also contains U+180E
      out += kind == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
    } else if (kind == 'd' || kind == 'D') {
      out += kind == 'd' ? "\\p{Nd}" : "\\P{Nd}";
    } else if ((kind == 'p' || kind == 'P') && take("{")) {
      const std::size_t end = text_.find('}', at_);
      const std::string_view name = end == std::string_view::npos ? "" : text_.substr(at_, end - at_);
      const bool is_script = std::ranges::find(kScripts, name) != kScripts.end();
      if (!is_script && std::ranges::find(kCategories, name) == kCategories.end()) fail("has an unknown property");
      out += std::string("\\") + static_cast<char>(kind) + '{' + (is_script ? "sc:" : "") + std::string(name) + '}';
      at_ = end + 1;
    } else {
      fail("has an unknown escape");
    }
    return meant;
  }

  char32_t read_code_point(std::size_t least, std::size_t most) {
    const std::size_t start = at_;
    while (at_ - start < most && at_ < text_.size() && is_hex_digit(text_[at_])) ++at_;
    if (at_ - start < least) fail("has an unknown escape");
    const auto value = static_cast<char32_t>(std::stoul(std::string(text_.substr(start, at_ - start)), nullptr, 16));
    if (value >= 0x110000 || (value >= 0xD800 && value < 0xE000)) fail("has an unknown escape");
    return value;
  }

  /// Read a class after its bracket. Intersections bind weaker than unions, so each side becomes a class.
  void read_class(bool is_nested) {
    const bool is_negated = take("^");
    std::vector<std::string> sides(1);
    while (!take("]")) {
      std::string& out = sides.back();
      if (take("&&")) {
        if (out.empty()) fail("has an empty class");
        sides.emplace_back();
      } else if (peek("[:")) {
        fail("has a POSIX class");
      } else if (take("[")) {
        if (is_nested) fail("has a class in a class in a class");
        std::swap(out, out_);
        read_class(true);
        std::swap(out, out_);
      } else {
        const std::optional<char32_t> first = read_member(out);
        if (!peek("-") || peek("-]")) continue;
        ++at_;
        out += '-';
        const std::optional<char32_t> last = peek("[") ? std::nullopt : read_member(out);
        if (!first || !last || *first > *last) fail("has an unknown range");
      }
    }
    if (sides.back().empty()) fail("has an empty class");
    out_ += is_negated ? "[^" : "[";
    for (std::size_t i = 0; i < sides.size(); ++i) {
      out_ += (i > 0 ? "&&" : "") + (sides.size() > 1 ? '[' + sides[i] + ']' : sides[i]);
    }
    out_ += ']';
  }

  std::optional<char32_t> read_member(std::string& out) {
    const char32_t member = character();
    if (member == '\\') return read_escape(out);
    out += escaped(member);
    return member;
  }

  /// Require that an alternative that may give back an unbounded repetition is followed by one that begins so too.
  void check_work(const Items& alternative, const Items& following) const {
    const std::size_t first = first_unbounded(alternative);
    std::vector<std::size_t> obligatory;
    for (std::size_t i = first + 1; i < alternative.size(); ++i) {
      if (alternative[i].is_obligatory()) obligatory.push_back(i);
    }
    if (obligatory.empty()) return;
    if (obligatory != std::vector{first + 1}) fail("can match an unbounded repetition in several ways");
    const auto same = [](const Item& a, const Item& b) {
      return a.atom == b.atom && a.least == b.least && a.most == b.most;
    };
    const std::size_t again = first_unbounded(following);
    const bool begins_so = again == first && first < following.size() &&
                           std::equal(following.begin(), following.begin() + static_cast<std::ptrdiff_t>(first),
                                      alternative.begin(), same) &&
                           alternative[first].atom == following[first].atom;
    if (!begins_so) {
      fail("has an alternative that goes on after an unbounded repetition, and none like it follows,");
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string translate_pattern(std::string_view pattern) { return Translator(pattern).translate(); }

std::string literal_pattern(std::string_view text) {
  std::string pattern;
  for (std::size_t at = 0; at < text.size();) pattern += escaped(next_code_point(text, at));
  return pattern;
}

}  // namespace chameleon
