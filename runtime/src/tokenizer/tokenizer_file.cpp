#include "tokenizer/tokenizer_file.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <set>
#include <unordered_set>

#include "tokenizer/pattern.h"
#include "tokenizer/utf8.h"

namespace chameleon {

constexpr std::int64_t kMaxTokenId = (1 << 24) - 1;  // bounds the tables of tokens; no vocabulary is that large

void read(const Json& json, const std::string& at, AddedToken& token) {
  Fields(json, at)
      .required("id", token.id)
      .required("content", token.content)
      .required("single_word", token.single_word)
      .required("lstrip", token.lstrip)
      .required("rstrip", token.rstrip)
      .required("normalized", token.normalized)
      .required("special", token.special)
      .finish();
  if (token.id < 0 || token.id > kMaxTokenId) fail_at(at + ".id", "is out of range");
  if (token.content.empty()) fail_at(at, "is empty");
}

namespace {

constexpr std::size_t kMaxSteps = 32;   // of a sequence
constexpr std::size_t kMaxGrowth = 64;  // characters that steps put in place of one; also of a prefix
constexpr std::int64_t kMaxUInt32 = std::numeric_limits<std::uint32_t>::max();

void require_range(std::int64_t number, std::int64_t most, const std::string& at) {
  if (number < 0 || number > most) fail_at(at, "must be from 0 to " + std::to_string(most));
}

void require_null(const Json& json, const char* field) {
  if (!json.contains(field)) fail_at("tokenizer.json", std::string("has no \"") + field + '"');
  if (!json.at(field).is_null()) fail_at(std::string("tokenizer.json.") + field, "is not supported");
}

std::string type_of(const Json& json, const std::string& at) {
  std::string type;
  if (!json.is_object() || !json.contains("type")) fail_at(at, "has no \"type\"");
  read(json.at("type"), at + ".type", type);
  return type;
}

/// The fields of a part, of which `type` has been read.
Fields fields_of(const Json& json, const std::string& at) {
  std::string type;
  Fields fields(json, at);
  fields.required("type", type);
  return fields;
}

std::string read_character(const Json& json, const std::string& at) {
  std::string character;
  read(json, at, character);
  if (count_code_points(character) != 1) fail_at(at, "must be one character");
  return character;
}

Regex read_pattern(const Json& json, const std::string& at) {
  if (!json.is_object() || json.size() != 1) fail_at(at, "a pattern is either String or Regex");
  std::string pattern;
  const std::string& kind = json.begin().key();
  if (kind != "String" && kind != "Regex") fail_at(at, "unknown field \"" + kind + '"');
  read(json.front(), at + "." + kind, pattern);
  if (kind == "Regex") return Regex(translate_pattern(pattern));
  if (pattern.empty()) fail_at(at, "is empty");
  return Regex(literal_pattern(pattern));
}

/// A pattern and what stands for a part that `Fields` can read.
struct PatternField {
  std::optional<Regex> pattern;
};
void read(const Json& json, const std::string& at, PatternField& field) { field.pattern = read_pattern(json, at); }

struct CharacterField {
  std::string character;
};
void read(const Json& json, const std::string& at, CharacterField& field) {
  field.character = read_character(json, at);
}

Replace read_replace(const Json& json, const std::string& at) {
  PatternField pattern;
  std::string content;
  fields_of(json, at).required("pattern", pattern).required("content", content).finish();
  return {*pattern.pattern, content};
}

ByteLevel read_byte_level(const Json& json, const std::string& at) {
  ByteLevel step;
  bool trim_offsets = false;
  fields_of(json, at)
      .required("add_prefix_space", step.add_prefix_space)
      .required("trim_offsets", trim_offsets)
      .required("use_regex", step.use_regex)
      .finish();
  return step;
}

Metaspace read_metaspace(const Json& json, const std::string& at) {
  Metaspace step;
  CharacterField replacement;
  std::string scheme;
  fields_of(json, at)
      .required("replacement", replacement)
      .one_of("prepend_scheme", scheme, {"always", "never", "first"})
      .required("split", step.split)
      .finish();
  step.replacement = replacement.character;
  step.scheme = scheme == "always"  ? PrependScheme::always
                : scheme == "never" ? PrependScheme::never
                                    : PrependScheme::first;
  return step;
}

void read_normalizer(const Json& json, const std::string& at, std::vector<Normalizer>& steps) {
  const std::string type = type_of(json, at);
  if (type == "NFC" || type == "NFKC") {
    fields_of(json, at).finish();
    steps.emplace_back(Nfc{type == "NFKC"});
  } else if (type == "Prepend") {
    Prepend step;
    fields_of(json, at).required("prepend", step.prefix).finish();
    if (count_code_points(step.prefix) > kMaxGrowth) fail_at(at, "prepends more than 64 characters");
    steps.emplace_back(step);
  } else if (type == "Replace") {
    steps.emplace_back(read_replace(json, at));
  } else if (type == "Strip") {
    Strip step;
    fields_of(json, at).required("strip_left", step.left).required("strip_right", step.right).finish();
    steps.emplace_back(step);
  } else if (type == "BertNormalizer") {
    BertNormalizer step;
    std::optional<bool> strip_accents;
    fields_of(json, at)
        .required("clean_text", step.clean_text)
        .required("handle_chinese_chars", step.handle_chinese_chars)
        .required("strip_accents", strip_accents)
        .required("lowercase", step.lowercase)
        .finish();
    step.strip_accents = strip_accents.value_or(step.lowercase);
    steps.emplace_back(step);
  } else {
    fail_at(at, "unknown type " + type);
  }
}

void read_split(const Json& json, const std::string& at, std::vector<PreTokenizer>& steps) {
  PatternField pattern;
  std::string behavior;
  bool invert = false;
  fields_of(json, at)
      .required("pattern", pattern)
      .one_of("behavior", behavior, {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})
      .required("invert", invert)
      .finish();
  const Behavior which = behavior == "Removed"              ? Behavior::removed
                         : behavior == "Isolated"           ? Behavior::isolated
                         : behavior == "MergedWithPrevious" ? Behavior::merged_with_previous
                         : behavior == "MergedWithNext"     ? Behavior::merged_with_next
                                                            : Behavior::contiguous;
  steps.emplace_back(Split{*pattern.pattern, which, invert});
}

void read_pre_tokenizer(const Json& json, const std::string& at, std::vector<PreTokenizer>& steps) {
  const std::string type = type_of(json, at);
  if (type == "ByteLevel") {
    steps.emplace_back(read_byte_level(json, at));
  } else if (type == "Digits") {
    bool individual_digits = false;
    fields_of(json, at).required("individual_digits", individual_digits).finish();
    steps.emplace_back(digits(individual_digits));
  } else if (type == "Split") {
    read_split(json, at, steps);
  } else if (type == "Metaspace") {
    steps.emplace_back(read_metaspace(json, at));
  } else if (type == "BertPreTokenizer") {
    fields_of(json, at).finish();
    steps.emplace_back(bert_spaces());
    steps.emplace_back(bert_punctuation());
  } else {
    fail_at(at, "unknown type " + type);
  }
}

void read_decoder(const Json& json, const std::string& at, std::vector<TokenDecoder>& steps) {
  const std::string type = type_of(json, at);
  if (type == "ByteLevel") {
    (void)read_byte_level(json, at);
    steps.emplace_back(ByteLevelDecoder{});
  } else if (type == "Replace") {
    steps.emplace_back(read_replace(json, at));
  } else if (type == "ByteFallback" || type == "Fuse") {
    fields_of(json, at).finish();
    type == "Fuse" ? steps.emplace_back(Fuse{}) : steps.emplace_back(ByteFallback{});
  } else if (type == "Strip") {
    StripDecoder step;
    CharacterField content;
    std::int64_t stop = 0;
    fields_of(json, at).required("content", content).required("start", step.start).required("stop", stop).finish();
    require_range(step.start, kMaxUInt32, at + ".start");
    if (stop != 0) fail_at(at + ".stop", "must be 0");  // `tokenizers` panics where a token is shorter than this
    step.character = content.character;
    steps.emplace_back(step);
  } else if (type == "Metaspace") {
    steps.emplace_back(read_metaspace(json, at));
  } else if (type == "WordPiece") {
    WordPieceDecoder step;
    fields_of(json, at).required("prefix", step.prefix).required("cleanup", step.cleanup).finish();
    steps.emplace_back(step);
  } else {
    fail_at(at, "unknown type " + type);
  }
}

/// The steps of a part: one, or those of a Sequence under the name `list`, or none where it may be null.
template <class Step>
void read_steps(const Json& file, const char* part, const char* list, bool may_be_null, std::vector<Step>& steps,
                void (*read_step)(const Json&, const std::string&, std::vector<Step>&)) {
  const std::string at = std::string("tokenizer.json.") + part;
  if (!file.contains(part)) fail_at("tokenizer.json", std::string("has no \"") + part + '"');
  const Json& json = file.at(part);
  if (may_be_null && json.is_null()) return;
  if (type_of(json, at) != "Sequence") return read_step(json, at, steps);
  if (!json.contains(list) || !json.at(list).is_array()) fail_at(at, std::string("has no list \"") + list + '"');
  if (json.size() != 2) fail_at(at, "has an unknown field");
  if (json.at(list).size() > kMaxSteps) fail_at(at, "has more than 32 steps");
  for (const Json& step : json.at(list)) read_step(step, at + '.' + list, steps);
}

template <class Step>
void check_growth(const std::vector<Step>& steps, const char* part) {
  std::size_t growth = 1;
  for (const Step& step : steps) {
    const auto* replace = std::get_if<Replace>(&step);
    if (replace == nullptr) continue;
    const std::size_t size = std::max<std::size_t>(1, count_code_points(replace->content));
    growth = std::min(growth, kMaxGrowth + 1) * std::min(size, kMaxGrowth + 1);
  }
  if (growth > kMaxGrowth) {
    fail_at(std::string("tokenizer.json.") + part, "a text can become more than 64 times as long");
  }
}

/// A text or a special token of a template: {"Sequence": ...} or {"SpecialToken": ...}.
struct TemplatePiece {
  bool is_text = false;
  std::string id;
};
void read(const Json& json, const std::string& at, TemplatePiece& piece) {
  if (!json.is_object() || json.size() != 1) fail_at(at, "must have one field");
  const std::string kind = json.begin().key();
  piece.is_text = kind == "Sequence";
  if (!piece.is_text && kind != "SpecialToken") fail_at(at, "unknown field \"" + kind + '"');
  std::int64_t type_id = 0;
  Fields(json.front(), at).required("id", piece.id).required("type_id", type_id).finish();
  require_range(type_id, kMaxUInt32, at + ".type_id");
}

struct SpecialToken {
  std::vector<std::int64_t> ids;
};
void read(const Json& json, const std::string& at, SpecialToken& token) {
  std::string id;
  std::vector<std::string> tokens;
  Fields(json, at).required("id", id).required("ids", token.ids).required("tokens", tokens).finish();
  for (const std::int64_t number : token.ids) require_range(number, kMaxUInt32, at + ".ids");
  if (token.ids.size() != tokens.size()) fail_at(at, "has not one id for each token");
}

void check_template(const std::vector<TemplatePiece>& pieces, const std::set<std::string>& texts,
                    const std::map<std::string, SpecialToken>& special_tokens, const std::string& at) {
  std::multiset<std::string> found;
  for (const TemplatePiece& piece : pieces) {
    if (piece.is_text) {
      found.insert(piece.id);
    } else if (!special_tokens.contains(piece.id)) {
      fail_at(at, "has an unknown special token");
    }
  }
  if (!std::ranges::equal(found, texts)) fail_at(at, "does not hold each text once");
}

void read_post_processor(const Json& json, const std::string& at, std::vector<SpecialTokens>& templates) {
  const std::string type = type_of(json, at);
  if (type == "ByteLevel") return (void)read_byte_level(json, at);
  if (type != "TemplateProcessing") fail_at(at, "unknown type " + type);
  std::vector<TemplatePiece> single, pair;
  std::map<std::string, SpecialToken> special_tokens;
  fields_of(json, at)
      .required("single", single)
      .required("pair", pair)
      .required("special_tokens", special_tokens)
      .finish();
  check_template(single, {"A"}, special_tokens, at + ".single");
  check_template(pair, {"A", "B"}, special_tokens, at + ".pair");
  SpecialTokens& around = templates.emplace_back();
  std::vector<std::int64_t>* side = &around.prefix_ids;
  for (const TemplatePiece& piece : single) {
    if (piece.is_text) {
      side = &around.suffix_ids;
    } else {
      std::ranges::copy(special_tokens.at(piece.id).ids, std::back_inserter(*side));
    }
  }
}

struct VocabularyField {
  Vocabulary vocabulary;
};
void read(const Json& json, const std::string& at, VocabularyField& field) {
  if (!json.is_object()) fail_at(at, "must be an object");
  field.vocabulary.reserve(json.size());
  std::unordered_set<std::int64_t> ids;
  for (const auto& [token, item] : json.items()) {
    std::int64_t id = 0;
    chameleon::read(item, at, id);
    require_range(id, kMaxTokenId, at);
    if (!ids.insert(id).second) fail_at(at, "two tokens have one id");
    field.vocabulary.emplace(token, static_cast<std::int32_t>(id));
  }
}

struct MergesField {
  std::vector<std::pair<std::string, std::string>> merges;
};
void read(const Json& json, const std::string& at, MergesField& field) {
  if (!json.is_array()) fail_at(at, "must be a list");
  field.merges.reserve(json.size());
  for (const Json& merge : json) {
    if (!merge.is_array() || merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) {
      fail_at(at, "a merge is not a pair of tokens");
    }
    field.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
}

std::variant<Bpe, WordPiece> read_model(const Json& json, const std::string& at) {
  const std::string type = type_of(json, at);
  VocabularyField vocabulary;
  if (type == "WordPiece") {
    std::string unk_token, prefix;
    std::int64_t most = 0;
    fields_of(json, at)
        .required("unk_token", unk_token)
        .required("continuing_subword_prefix", prefix)
        .required("max_input_chars_per_word", most)
        .required("vocab", vocabulary)
        .finish();
    require_range(most, 1000, at + ".max_input_chars_per_word");  // words take quadratic time
    return WordPiece(std::move(vocabulary.vocabulary), unk_token, prefix, static_cast<std::size_t>(most));
  }
  if (type != "BPE") fail_at(at, "unknown type " + type);
  Bpe::Options options;
  std::optional<double> dropout;
  std::optional<std::string> prefix, suffix;
  MergesField merges;
  fields_of(json, at)
      .required("dropout", dropout)
      .required("unk_token", options.unk_token)
      .required("continuing_subword_prefix", prefix)
      .required("end_of_word_suffix", suffix)
      .required("fuse_unk", options.fuse_unk)
      .required("byte_fallback", options.byte_fallback)
      .required("ignore_merges", options.ignore_merges)
      .required("vocab", vocabulary)
      .required("merges", merges)
      .finish();
  if (dropout.value_or(0) != 0) fail_at(at + ".dropout", "is not supported");
  if (!prefix.value_or("").empty() || !suffix.value_or("").empty()) {
    fail_at(at, "continuing_subword_prefix and end_of_word_suffix are not supported");
  }
  return Bpe(std::move(vocabulary.vocabulary), merges.merges, options);
}

/// `tokenizers` gives a token that the vocabulary lacks the next free id.
void check_added_tokens(const std::vector<AddedToken>& tokens, const Vocabulary& vocabulary) {
  auto following = static_cast<std::int64_t>(vocabulary.size());
  std::unordered_set<std::string> seen;
  for (const AddedToken& token : tokens) {
    const auto found = vocabulary.find(token.content);
    const std::int64_t expected = found == vocabulary.end() ? following++ : found->second;
    if (token.id != expected || !seen.insert(token.content).second) {
      fail_at("tokenizer.json.added_tokens", "'" + token.content + "' with id " + std::to_string(token.id) +
                                                 " would get the id " + std::to_string(expected));
    }
  }
}

}  // namespace

TokenizerFile read_tokenizer_file(const Json& json) {
  if (!json.is_object()) fail_at("tokenizer.json", "must be an object");
  constexpr std::array known = {"version",       "truncation",     "padding", "added_tokens", "normalizer",
                                "pre_tokenizer", "post_processor", "decoder", "model"};
  for (const auto& [field, value] : json.items()) {
    if (std::ranges::find(known, field) == known.end()) fail_at("tokenizer.json", "unknown field \"" + field + '"');
  }
  if (json.value("version", Json()) != "1.0") fail_at("tokenizer.json.version", "must be 1.0");
  require_null(json, "truncation");
  require_null(json, "padding");
  std::vector<AddedToken> added_tokens;
  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  std::vector<TokenDecoder> decoders;
  std::vector<SpecialTokens> templates;
  if (!json.contains("added_tokens") || !json.contains("model")) fail_at("tokenizer.json", "has no tokens or no model");
  read(json.at("added_tokens"), "tokenizer.json.added_tokens", added_tokens);
  read_steps(json, "normalizer", "normalizers", true, normalizers, read_normalizer);
  read_steps(json, "pre_tokenizer", "pretokenizers", true, pre_tokenizers, read_pre_tokenizer);
  read_steps(json, "post_processor", "processors", true, templates, read_post_processor);
  read_steps(json, "decoder", "decoders", false, decoders, read_decoder);
  check_growth(normalizers, "normalizer");
  check_growth(decoders, "decoder");
  for (std::size_t i = 0; i < pre_tokenizers.size(); ++i) {
    const auto* metaspace = std::get_if<Metaspace>(&pre_tokenizers[i]);
    const bool is_first = metaspace != nullptr && metaspace->scheme == PrependScheme::first;
    if (is_first && (i > 0 || !json.at("normalizer").is_null())) {
      fail_at("tokenizer.json.pre_tokenizer",
              "Metaspace of scheme first is taken without normalizer, as the first step");
    }
  }
  auto model = read_model(json.at("model"), "tokenizer.json.model");
  const auto& vocabulary = std::visit([](const auto& m) -> const Vocabulary& { return m.vocabulary(); }, model);
  check_added_tokens(added_tokens, vocabulary);
  if (templates.size() > 1) fail_at("tokenizer.json.post_processor", "has more than one template");
  if (templates.empty()) templates.emplace_back();
  return {std::move(added_tokens), std::move(normalizers),  std::move(pre_tokenizers),
          std::move(decoders),     std::move(templates[0]), std::move(model)};
}

}  // namespace chameleon
