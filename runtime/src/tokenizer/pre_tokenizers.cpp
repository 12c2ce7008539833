#include "tokenizer/pre_tokenizers.h"

#include <algorithm>
#include <span>

#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

// GPT-2's pattern: contractions, then runs of letters, numbers or anything else with one space in front, then spaces.
// Its \s is Unicode's White_Space; PCRE2's \s also contains U+180E.
constexpr std::string_view kWords = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+)"
                                    R"(|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";

// The characters that Digits splits at. `tokenizers` follows Unicode 17, which has thirteen more numbers than the
// Unicode 16 of PCRE2.
constexpr std::string_view kDigit = R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])";

// BertPreTokenizer takes all of ASCII's punctuation and that of Unicode 8: without the newer, and with two more.
constexpr std::string_view kPunctuation =
    R"([!-/:-@\[-`{-~\x{166D}\x{111C9}]|(?![)"
    R"(\x{61D}\x{9FD}\x{A76}\x{C77}\x{C84}\x{1B4E}-\x{1B4F}\x{1B7D}-\x{1B7F}\x{2E43}-\x{2E4F})"
    R"(\x{2E52}-\x{2E5D}\x{10D6E}\x{10EAD}\x{10F55}-\x{10F59}\x{10F86}-\x{10F89}\x{113D4}-\x{113D5})"
    R"(\x{113D7}-\x{113D8}\x{1144B}-\x{1144F}\x{1145A}-\x{1145B}\x{1145D}\x{11660}-\x{1166C}\x{116B9})"
    R"(\x{1183B}\x{11944}-\x{11946}\x{119E2}\x{11A3F}-\x{11A46}\x{11A9A}-\x{11A9C}\x{11A9E}-\x{11AA2})"
    R"(\x{11B00}-\x{11B09}\x{11BE1}\x{11C41}-\x{11C45}\x{11C70}-\x{11C71}\x{11EF7}-\x{11EF8})"
    R"(\x{11F43}-\x{11F4F}\x{11FFF}\x{12FF1}-\x{12FF2}\x{16D6D}-\x{16D6F}\x{16E97}-\x{16E9A}\x{16FE2})"
    R"(\x{1E5FF}\x{1E95E}-\x{1E95F})"
    R"(])\p{P})";

using OnWord = std::function<void(std::string_view)>;
using Steps = std::span<const PreTokenizer>;

void apply_all(Steps steps, std::string_view text, bool is_start, const OnWord& on_word);

/// A match, or what is between two.
struct Part {
  Span span;
  bool is_match;
};

/// Parts after matches have been merged with what is next to them, as `tokenizers` does it.
std::vector<Part> merged(const std::vector<Part>& parts, Behavior behavior) {
  std::vector<Part> result;
  bool after_match = false;
  for (const Part& part : parts) {
    const bool joins = behavior == Behavior::contiguous ? part.is_match == after_match
                                                        : part.is_match && !after_match;  // with the previous
    if (joins && !result.empty()) {
      result.back().span.end = part.span.end;
    } else {
      result.push_back(part);
    }
    after_match = part.is_match;
  }
  return result;
}

/// The same from the end: a match begins what follows it, unless that is a match.
std::vector<Part> merged_with_next(const std::vector<Part>& parts) {
  std::vector<Part> result;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const bool joins = i > 0 && parts[i - 1].is_match && !parts[i].is_match;
    if (joins) {
      result.back().span.end = parts[i].span.end;
    } else {
      result.push_back(parts[i]);
    }
  }
  return result;
}

void apply(const Split& split, Steps others, std::string_view text, const OnWord& on_word) {
  if (split.behavior == Behavior::isolated || split.behavior == Behavior::removed) {
    split.pattern.for_each(text, [&](Span span, bool is_match) {
      const bool is_removed = split.behavior == Behavior::removed && is_match != split.invert;
      if (!is_removed) apply_all(others, span.of(text), false, on_word);
    });
    return;
  }
  std::vector<Part> parts;
  split.pattern.for_each(text, [&](Span span, bool is_match) { parts.push_back({span, is_match != split.invert}); });
  const bool with_next = split.behavior == Behavior::merged_with_next;
  for (const Part& part : with_next ? merged_with_next(parts) : merged(parts, split.behavior)) {
    apply_all(others, part.span.of(text), false, on_word);
  }
}

void apply(const ByteLevel& step, Steps others, std::string_view text, const OnWord& on_word) {
  static const Regex words(kWords);
  std::string prefixed;
  if (step.add_prefix_space && !text.starts_with(' ')) {
    prefixed = ' ' + std::string(text);
    text = prefixed;
  }
  const auto& alphabet = byte_alphabet();
  std::string written;
  const auto apply_others = [&](Span span, bool) {
    written.clear();
    for (const char byte : span.of(text)) written += alphabet[static_cast<unsigned char>(byte)];
    apply_all(others, written, false, on_word);
  };
  step.use_regex ? words.for_each(text, apply_others) : apply_others({0, text.size()}, true);
}

void apply(const Metaspace& step, Steps others, std::string_view text, bool is_start, const OnWord& on_word) {
  std::string written;
  for (const char byte : text) byte == ' ' ? written.append(step.replacement) : written.append(1, byte);
  const bool prepends = step.scheme == PrependScheme::always || (step.scheme == PrependScheme::first && is_start);
  if (prepends && !written.starts_with(step.replacement)) written.insert(0, step.replacement);
  if (!step.split) return apply_all(others, written, false, on_word);
  for (std::size_t start = 0; start < written.size();) {  // each replacement begins a word
    const std::size_t end = std::min(written.find(step.replacement, start + 1), written.size());
    apply_all(others, std::string_view(written).substr(start, end - start), false, on_word);
    start = end;
  }
}

void apply_all(Steps steps, std::string_view text, bool is_start, const OnWord& on_word) {
  if (steps.empty()) return on_word(text);
  const Steps others = steps.subspan(1);
  if (const auto* split = std::get_if<Split>(&steps.front())) return apply(*split, others, text, on_word);
  if (const auto* bytes = std::get_if<ByteLevel>(&steps.front())) return apply(*bytes, others, text, on_word);
  apply(std::get<Metaspace>(steps.front()), others, text, is_start, on_word);
}

}  // namespace

Split digits(bool individual_digits) {
  return {Regex(kDigit), individual_digits ? Behavior::isolated : Behavior::contiguous, false};
}

Split bert_spaces() { return {Regex(R"(\p{White_Space})"), Behavior::removed, false}; }

Split bert_punctuation() { return {Regex(kPunctuation), Behavior::isolated, false}; }

const std::vector<std::string>& byte_alphabet() {
  static const std::vector<std::string> alphabet = [] {
    std::vector<std::string> characters(256);
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      append_utf8(characters[byte], printable ? byte : next++);
    }
    return characters;
  }();
  return alphabet;
}

void split_into_words(const std::vector<PreTokenizer>& steps, std::string_view text, bool is_start,
                      const OnWord& on_word) {
  if (!text.empty()) apply_all(steps, text, is_start, on_word);
}

}  // namespace chameleon
