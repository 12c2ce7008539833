#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/unicode_regex.h"

namespace chameleon {

/// What becomes of the matches of a Split: of "-" in "a--b", parts "a", "b"; "a", "-", "-", "b"; "a-", "-", "b"; "a",
/// "-", "-b"; "a", "--", "b".
enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

/// Also Digits and the two steps of BertPreTokenizer.
struct Split {
  Regex pattern;
  Behavior behavior = Behavior::isolated;
  bool invert = false;
};

struct ByteLevel {
  bool add_prefix_space = false;
  bool use_regex = false;
};

enum class PrependScheme { always, never, first };

/// Also a decoder.
struct Metaspace {
  std::string replacement;
  PrependScheme scheme = PrependScheme::always;
  bool split = false;
};

using PreTokenizer = std::variant<Split, ByteLevel, Metaspace>;

Split digits(bool individual_digits);
Split bert_spaces();
Split bert_punctuation();

/// GPT-2 writes every byte as a printable character: a printable byte as itself, others as U+0100 and following. These
/// are the characters in UTF-8, by byte.
const std::vector<std::string>& byte_alphabet();

/// Call `on_word` for each word of a text, which is not empty. is_start: whether the text is at the start of the whole.
void split_into_words(const std::vector<PreTokenizer>& steps, std::string_view text, bool is_start,
                      const std::function<void(std::string_view)>& on_word);

}  // namespace chameleon
