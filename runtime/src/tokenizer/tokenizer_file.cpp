#include "tokenizer/tokenizer_file.h"

#include <limits>
#include <set>

namespace chameleon {

namespace {

void require_range(std::int64_t number, std::int64_t most, const std::string& at) {
  if (number < 0 || number > most) fail_at(at, "must be from 0 to " + std::to_string(most));
}

constexpr std::int64_t kMaxUInt32 = std::numeric_limits<std::uint32_t>::max();

struct Null {};
void read(const Json& json, const std::string& at, Null&) {
  if (!json.is_null()) fail_at(at, "is not supported");
}

struct ByteLevel {};
void read(const Json& json, const std::string& at, ByteLevel&) {
  std::string type;
  bool flag = false;
  Fields(json, at)
      .one_of("type", type, {"ByteLevel"})
      .required("add_prefix_space", flag)
      .required("trim_offsets", flag)
      .required("use_regex", flag)
      .finish();
}

/// ByteLevel, or the step before it.
struct Step {};
void read(const Json& json, const std::string& at, Step&) {
  if (ByteLevel step; !json.is_object() || json.value("type", Json()) != "Digits") return read(json, at, step);
  std::string type;
  bool flag = false;
  Fields(json, at).required("type", type).required("individual_digits", flag).finish();
}

struct PreTokenizer {};
void read(const Json& json, const std::string& at, PreTokenizer&) {
  if (ByteLevel step; !json.is_object() || json.value("type", Json()) != "Sequence") return read(json, at, step);
  std::string type;
  std::vector<Step> steps;
  Fields(json, at).required("type", type).required("pretokenizers", steps).finish();
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

struct SpecialToken {};
void read(const Json& json, const std::string& at, SpecialToken&) {
  std::string id;
  std::vector<std::int64_t> ids;
  std::vector<std::string> tokens;
  Fields(json, at).required("id", id).required("ids", ids).required("tokens", tokens).finish();
  for (const std::int64_t number : ids) require_range(number, kMaxUInt32, at + ".ids");
  if (ids.size() != tokens.size()) fail_at(at, "has not one id for each token");
}

void check_template(const std::vector<TemplatePiece>& pieces, const std::set<std::string>& texts,
                    const std::map<std::string, SpecialToken>& special_tokens, const std::string& at) {
  std::set<std::string> found;
  for (const TemplatePiece& piece : pieces) {
    if (piece.is_text) {
      found.insert(piece.id);
    } else if (!special_tokens.contains(piece.id)) {
      fail_at(at, "has an unknown special token");
    }
  }
  if (found != texts) fail_at(at, "does not hold each text");
}

/// It concerns what is added around a text, which the runtimes never ask for.
struct PostProcessor {};
void read(const Json& json, const std::string& at, PostProcessor&) {
  if (ByteLevel step; !json.is_object() || json.value("type", Json()) != "TemplateProcessing") {
    return read(json, at, step);
  }
  std::string type;
  std::vector<TemplatePiece> single, pair;
  std::map<std::string, SpecialToken> special_tokens;
  Fields(json, at)
      .required("type", type)
      .required("single", single)
      .required("pair", pair)
      .required("special_tokens", special_tokens)
      .finish();
  check_template(single, {"A"}, special_tokens, at + ".single");
  check_template(pair, {"A", "B"}, special_tokens, at + ".pair");
}

struct Model {};
void read(const Json& json, const std::string& at, Model&) {
  std::string type;
  std::optional<double> dropout;
  std::optional<std::string> option;
  bool flag = false;
  std::map<std::string, std::int64_t> vocab;
  std::vector<std::vector<std::string>> merges;
  Fields(json, at)
      .one_of("type", type, {"BPE"})
      .required("dropout", dropout)
      .required("unk_token", option)
      .required("continuing_subword_prefix", option)
      .required("end_of_word_suffix", option)
      .required("fuse_unk", flag)
      .required("byte_fallback", flag)
      .required("ignore_merges", flag)
      .required("vocab", vocab)
      .required("merges", merges)
      .finish();
  for (const auto& [token, id] : vocab) require_range(id, kMaxTokenId, at + ".vocab");
  for (const auto& merge : merges) {
    if (merge.size() != 2) fail_at(at + ".merges", "a merge is not a pair of tokens");
  }
}

}  // namespace

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
  require_range(token.id, kMaxTokenId, at + ".id");
  if (token.content.empty()) fail_at(at, "is empty");
}

void check_tokenizer_file(const Json& json) {
  std::string version;
  Null none;
  std::vector<AddedToken> added;
  PreTokenizer pre_tokenizer;
  std::optional<PostProcessor> post_processor;
  ByteLevel decoder;
  Model model;
  Fields(json, "tokenizer.json")
      .one_of("version", version, {"1.0"})
      .required("truncation", none)
      .required("padding", none)
      .required("added_tokens", added)
      .required("normalizer", none)
      .required("pre_tokenizer", pre_tokenizer)
      .required("post_processor", post_processor)
      .required("decoder", decoder)
      .required("model", model)
      .finish();
}

}  // namespace chameleon
