#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

std::uint64_t edge(std::uint32_t node, char byte) {
  return (std::uint64_t{node} << 8) | static_cast<unsigned char>(byte);
}

/// \w as defined for Unicode regular expressions (UTS 18, annex C); PCRE2's \w is narrower.
bool is_word(std::string_view character) {
  static const Regex word(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])");
  return word.search(character).has_value();
}

bool stands_alone(std::string_view text, Span span) {
  const std::string_view before = text.substr(0, span.start), after = text.substr(span.end);
  return (before.empty() || !is_word(before.substr(last_code_point(before)))) &&
         (after.empty() || !is_word(after.substr(0, next_offset(after, 0))));
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    std::uint32_t node = 0;
    for (const char byte : token.content) {
      const auto [found, is_new] = nodes_.try_emplace(edge(node, byte), static_cast<std::uint32_t>(ends_.size()));
      if (is_new) ends_.push_back(-1);
      node = found->second;
    }
    if (node == 0 || ends_[node] >= 0) {
      throw ManifestError("tokenizer.json: added_tokens: '" + token.content + "' is empty or there twice");
    }
    ends_[node] = static_cast<std::int32_t>(i);
    is_first_byte_[static_cast<unsigned char>(token.content.front())] = true;
  }
}

std::optional<AddedTokens::Match> AddedTokens::find(std::string_view text, std::size_t start) const {
  for (; start < text.size(); ++start) {
    if (!is_first_byte_[static_cast<unsigned char>(text[start])]) continue;
    std::optional<Match> longest;
    std::uint32_t node = 0;
    for (std::size_t at = start; at < text.size(); ++at) {
      const auto next = nodes_.find(edge(node, text[at]));
      if (next == nodes_.end()) break;
      node = next->second;
      if (ends_[node] >= 0) longest = Match{&tokens_[static_cast<std::size_t>(ends_[node])], {start, at + 1}};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

std::vector<Piece> AddedTokens::split(std::string_view text) const {
  std::vector<Piece> pieces;
  std::size_t done = 0;  // everything before it is in pieces
  std::size_t searched = 0;
  while (const std::optional<Match> match = find(text, searched)) {
    auto [token, span] = *match;
    searched = span.end;
    if (token->single_word && !stands_alone(text, span)) continue;
    if (token->lstrip) span.start = std::max(done, span.start - spaces_at_end(text.substr(0, span.start)));
    if (token->rstrip) span.end += spaces_at_start(text.substr(span.end));
    if (done < span.start) pieces.push_back({text.substr(done, span.start - done), std::nullopt});
    pieces.push_back({{}, token->id});
    done = span.end;
  }
  if (done < text.size()) pieces.push_back({text.substr(done), std::nullopt});
  return pieces;
}

}  // namespace chameleon
