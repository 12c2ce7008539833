#include "chameleon/tokenizer.h"

#include <algorithm>
#include <iterator>
#include <unordered_set>
#include <utility>

#include "chameleon/error.h"
#include "tokenizer/tokenizer_file.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

constexpr std::size_t kMaxPending = 16;    // tokens waited for until they complete a character, of at most 4 bytes
constexpr std::size_t kMaxIncomplete = 3;  // bytes of a character without its last

std::vector<AddedToken> tokens_of(const TokenizerFile& file, bool normalized) {
  std::vector<AddedToken> tokens;
  for (const AddedToken& token : file.added_tokens) {
    if (token.normalized != normalized) continue;
    tokens.push_back(token);
    if (normalized) tokens.back().content = normalize(file.normalizers, token.content);
  }
  return tokens;
}

}  // namespace

struct Tokenizer::Impl {
  TokenizerFile file;
  AddedTokens plain, normalized;  // plain tokens are found first, in the text as it was given
  struct Token {
    std::string text;    // as the file writes it
    std::string normal;  // as the decoders are given it
    bool exists = false;
    bool special = false;
  };
  std::vector<Token> tokens;  // by id

  explicit Impl(TokenizerFile read);
  void encode_text(std::string_view text, bool is_start, std::vector<std::int64_t>& ids) const;
};

Tokenizer::Impl::Impl(TokenizerFile read)
    : file(std::move(read)), plain(tokens_of(file, false)), normalized(tokens_of(file, true)) {
  const auto store = [&](std::int64_t id, const std::string& text, const std::string& normal) {
    const auto index = static_cast<std::size_t>(id);
    if (index >= tokens.size()) tokens.resize(index + 1);
    tokens[index] = {text, normal, true, false};
  };
  const auto& vocabulary =
      std::visit([](const auto& model) -> const Vocabulary& { return model.vocabulary(); }, file.model);
  for (const auto& [token, id] : vocabulary) store(id, token, token);
  std::unordered_set<std::string> special;
  for (const AddedToken& token : file.added_tokens) {
    store(token.id, token.content, token.normalized ? normalize(file.normalizers, token.content) : token.content);
    if (token.special) special.insert(token.content);
  }
  for (Token& token : tokens) token.special = special.contains(token.normal);
}

/// Encode text between plain added tokens.
void Tokenizer::Impl::encode_text(std::string_view text, bool is_start, std::vector<std::int64_t>& ids) const {
  std::string normal;
  if (!file.normalizers.empty()) text = normal = normalize(file.normalizers, text);
  for (const Piece& piece : normalized.split(text)) {
    if (piece.token) {
      ids.push_back(*piece.token);
      continue;
    }
    std::visit(
        [&](const auto& model) {
          split_into_words(file.pre_tokenizers, piece.text, is_start && piece.text.data() == text.data(),
                           [&](std::string_view word) { model.encode(word, ids); });
        },
        file.model);
  }
}

Tokenizer::Tokenizer(std::string_view json) {
  try {
    impl_ = std::make_unique<const Impl>(read_tokenizer_file(Json::parse(json)));
  } catch (const Json::exception& error) {
    throw ManifestError(std::string("tokenizer.json: ") + error.what());
  }
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (const auto offset = find_invalid_utf8(text)) {
    throw InputError("the text is not UTF-8 at byte " + std::to_string(*offset));
  }
  std::vector<std::int64_t> ids;
  if (add_special_tokens) ids = impl_->file.special_tokens.prefix_ids;
  for (const Piece& piece : impl_->plain.split(text)) {
    if (piece.token) {
      ids.push_back(*piece.token);
    } else {
      impl_->encode_text(piece.text, piece.text.data() == text.data(), ids);
    }
  }
  if (add_special_tokens) std::ranges::copy(impl_->file.special_tokens.suffix_ids, std::back_inserter(ids));
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int64_t> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= std::ssize(impl_->tokens)) continue;
    const Impl::Token& token = impl_->tokens[static_cast<std::size_t>(id)];
    if (token.exists && !(token.special && skip_special_tokens)) tokens.push_back(token.normal);
  }
  return decode_tokens(impl_->file.decoders, std::move(tokens));
}

std::string_view Tokenizer::token(std::int64_t id) const {
  if (id < 0 || id >= std::ssize(impl_->tokens)) return {};
  return impl_->tokens[static_cast<std::size_t>(id)].text;
}

namespace {

/// How many characters of a text no later token changes: not those that may be bytes of its last one.
std::size_t settled(std::string_view text) {
  for (std::size_t i = 0; i < kMaxIncomplete && text.ends_with(kReplacement); ++i)
    text.remove_suffix(kReplacement.size());
  return count_code_points(text);
}

std::size_t offset_of(std::string_view text, std::size_t characters) {
  std::size_t at = 0;
  for (std::size_t i = 0; i < characters && at < text.size(); ++i) at = next_offset(text, at);
  return at;
}

}  // namespace

std::string DecodeStream::step(const Tokenizer& tokenizer, std::int64_t id) {
  ids_.push_back(id);
  std::string text = tokenizer.decode(ids_, skip_special_tokens_);
  const std::size_t size = count_code_points(text);
  const bool is_complete = size > shown_ && !text.ends_with(kReplacement);
  if (!is_complete && ids_.size() - num_shown_ < kMaxPending) return {};
  text.resize(offset_of(text, settled(text)));
  text.erase(0, offset_of(text, shown_));
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(num_shown_));
  num_shown_ = ids_.size();
  shown_ = settled(tokenizer.decode(ids_, skip_special_tokens_));  // tokens are decoded after those before
  return text;
}

}  // namespace chameleon
