#include "chameleon/tokenizer.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <utility>

#include "chameleon/error.h"
#include "contract/json_fields.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/tokenizer_file.h"
#include "tokenizer/unicode_regex.h"
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

/// GPT-2 writes every byte as a printable character: a printable byte as itself, others as U+0100 and following.
std::array<char32_t, 256> byte_characters() {
  std::array<char32_t, 256> characters{};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    characters[byte] = printable ? byte : next++;
  }
  return characters;
}

/// The bytes of a token. A token with a character outside the byte alphabet means its own UTF-8.
std::string token_bytes(const std::string& token, const std::unordered_map<char32_t, char>& bytes_of) {
  std::string bytes;
  for (std::size_t offset = 0; offset < token.size();) {
    const auto found = bytes_of.find(next_code_point(token, offset));
    if (found == bytes_of.end()) return token;
    bytes += found->second;
  }
  return bytes;
}

void require_type(const Json& json, const char* key, const char* type) {
  const Json part = json.value(key, Json());
  if (!part.is_object() || part.value("type", "") != type) {
    fail_at("tokenizer.json", std::string(key) + " is not of type " + type);
  }
}

/// For an option that pads or cuts a text, or makes its token ids depend on chance: export leaves none of them on.
[[noreturn]] void refuse_option(const char* name) {
  fail_at("tokenizer.json", std::string(name) + " is not supported: export again, which sets it to null");
}

/// Refuse options that would change token ids and that the GPT-2 family does not use.
void refuse_options(const Json& json) {
  require_type(json, "model", "BPE");
  require_type(json, "decoder", "ByteLevel");
  for (const char* key : {"truncation", "padding"}) {
    if (!json.value(key, Json()).is_null()) refuse_option(key);
  }
  const Json dropout = json.at("model").value("dropout", Json());
  if (!dropout.is_null() && dropout != 0) refuse_option("model.dropout");
  if (!json.value("normalizer", Json()).is_null()) fail_at("tokenizer.json", "normalizer is not supported");
  for (const char* key : {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json option = json.at("model").value(key, Json());
    if (!option.is_null() && option != "") {
      fail_at("tokenizer.json", std::string("model.") + key + " is not supported");
    }
  }
  for (const char* key : {"byte_fallback", "ignore_merges"}) {
    if (json.at("model").value(key, false))
      fail_at("tokenizer.json", std::string("model.") + key + " is not supported");
  }
}

/// How a text is split into words: by ByteLevel alone, as in GPT-2, or by Digits first, as in SmolLM.
struct WordRules {
  bool split_digits = false;  ///< each digit is a word
  bool add_prefix_space = false;
};

WordRules read_word_rules(const Json& json) {
  WordRules rules;
  Json byte_level = json.value("pre_tokenizer", Json());
  if (byte_level.is_object() && byte_level.value("type", "") == "Sequence") {
    const Json steps = byte_level.value("pretokenizers", Json());
    if (!steps.is_array() || steps.size() != 2 || steps[0].value("type", "") != "Digits" ||
        !steps[0].value("individual_digits", false)) {
      fail_at("tokenizer.json", "pre_tokenizer is a Sequence other than Digits (individual_digits) and ByteLevel");
    }
    rules.split_digits = true;
    byte_level = steps[1];
  }
  if (!byte_level.is_object() || byte_level.value("type", "") != "ByteLevel") {
    fail_at("tokenizer.json", "pre_tokenizer is neither ByteLevel nor Digits and ByteLevel");
  }
  if (!byte_level.value("use_regex", true)) fail_at("tokenizer.json", "use_regex=false is not supported");
  rules.add_prefix_space = byte_level.value("add_prefix_space", true);
  return rules;
}

}  // namespace

struct Tokenizer::Impl {
  Regex words{kWords}, digit{kDigit};
  std::vector<AddedToken> plain, normalized;  // plain tokens are searched first
  WordRules rules;
  std::vector<std::string> tokens;  // by id
  std::vector<std::string> bytes;   // by id; empty for special tokens
  std::unique_ptr<const Bpe> bpe;

  explicit Impl(const Json& json);
  void encode_text(std::string_view text, std::vector<std::int64_t>& ids) const;
  void encode_words(std::string_view text, std::vector<std::int64_t>& ids) const;
};

Tokenizer::Impl::Impl(const Json& json) {
  refuse_options(json);
  check_tokenizer_file(json);
  rules = read_word_rules(json);
  std::unordered_map<char32_t, char> bytes_of;
  const auto characters = byte_characters();
  for (std::size_t byte = 0; byte < 256; ++byte) bytes_of[characters[byte]] = static_cast<char>(byte);

  std::map<std::string, std::int64_t> vocab;
  chameleon::read(json.at("model").at("vocab"), "tokenizer.json: model.vocab", vocab);
  std::vector<AddedToken> added;
  if (json.contains("added_tokens")) chameleon::read(json.at("added_tokens"), "tokenizer.json: added_tokens", added);
  const auto store = [&](std::int64_t id, const std::string& token, bool special) {
    if (id < 0 || id > kMaxTokenId) fail_at("tokenizer.json", "id " + std::to_string(id) + " is out of range");
    const auto index = static_cast<std::size_t>(id);
    if (index >= tokens.size()) {
      tokens.resize(index + 1);
      bytes.resize(index + 1);
    }
    tokens[index] = token;
    bytes[index] = special ? "" : token_bytes(token, bytes_of);
  };
  for (const auto& [token, id] : vocab) store(id, token, false);
  for (AddedToken& token : added) {
    store(token.id, token.content, token.special);
    (token.normalized ? normalized : plain).push_back(std::move(token));
  }

  const auto id_of = [&](const std::string& token) {
    const auto found = vocab.find(token);
    return found == vocab.end() ? -1 : static_cast<std::int32_t>(found->second);
  };
  std::array<std::int32_t, 256> byte_ids{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::string character;
    append_utf8(character, characters[byte]);
    byte_ids[byte] = id_of(character);
  }
  std::vector<Bpe::Merge> merges;
  for (const Json& item : json.at("model").at("merges")) {
    const auto [left, right] = item.get<std::pair<std::string, std::string>>();
    merges.push_back({id_of(left), id_of(right), id_of(left + right)});
    if (merges.back().left < 0 || merges.back().right < 0 || merges.back().merged < 0) {
      fail_at("tokenizer.json: model.merges", "'" + left + " " + right + "' is not in the vocabulary");
    }
  }
  bpe = std::make_unique<const Bpe>(byte_ids, merges);
}

/// Encode the text between added tokens.
void Tokenizer::Impl::encode_text(std::string_view text, std::vector<std::int64_t>& ids) const {
  if (!rules.split_digits) return encode_words(text, ids);
  std::size_t done = 0;
  while (const std::optional<Span> found = digit.search(text, done)) {
    encode_words(text.substr(done, found->start - done), ids);
    encode_words(text.substr(found->start, found->end - found->start), ids);
    done = found->end;
  }
  encode_words(text.substr(done), ids);
}

/// Encode a piece that Digits does not split: each of its words is merged separately.
void Tokenizer::Impl::encode_words(std::string_view text, std::vector<std::int64_t>& ids) const {
  if (text.empty()) return;
  const std::string prefixed =
      rules.add_prefix_space && !text.starts_with(' ') ? ' ' + std::string(text) : std::string();
  if (!prefixed.empty()) text = prefixed;
  std::size_t done = 0;
  while (done < text.size()) {  // the pattern matches everywhere: each character is in one of its classes
    const Span word = words.search(text, done).value();
    bpe->encode(text.substr(word.start, word.end - word.start), ids);
    done = word.end;
  }
}

Tokenizer::Tokenizer(std::string_view json) {
  try {
    impl_ = std::make_unique<const Impl>(Json::parse(json));
  } catch (const Json::exception& error) {
    throw ManifestError(std::string("tokenizer.json: ") + error.what());
  }
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
  if (const auto offset = find_invalid_utf8(text)) {
    throw InputError("the text is not UTF-8 at byte " + std::to_string(*offset));
  }
  std::vector<std::int64_t> ids;
  for (const Piece& outer : split_at(text, impl_->plain)) {
    if (outer.token) {
      ids.push_back(*outer.token);
      continue;
    }
    for (const Piece& inner : split_at(outer.text, impl_->normalized)) {
      if (inner.token) {
        ids.push_back(*inner.token);
      } else {
        impl_->encode_text(inner.text, ids);
      }
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int64_t> ids, bool skip_special_tokens) const {
  std::string joined;
  for (const std::int64_t id : ids) {
    const std::string_view found = bytes(id);
    joined += found.empty() && !skip_special_tokens ? token(id) : found;  // only special tokens have no bytes
  }
  return replace_invalid_utf8(joined);
}

std::string_view Tokenizer::bytes(std::int64_t id) const {
  if (id < 0 || id >= static_cast<std::int64_t>(impl_->bytes.size())) return {};
  return impl_->bytes[static_cast<std::size_t>(id)];
}

std::string_view Tokenizer::token(std::int64_t id) const {
  if (id < 0 || id >= static_cast<std::int64_t>(impl_->tokens.size())) return {};
  return impl_->tokens[static_cast<std::size_t>(id)];
}

}  // namespace chameleon
