#include "tokenizer/added_tokens.h"

#include <algorithm>

namespace chameleon {

namespace {

struct Match {
  const AddedToken* token;
  Span span;
};

std::optional<Match> find_next(std::string_view text, std::size_t start, const std::vector<AddedToken>& tokens) {
  std::optional<Match> best;
  for (const AddedToken& token : tokens) {
    const std::size_t at = text.find(token.content, start);
    if (at == std::string_view::npos) continue;
    const bool better = !best || at < best->span.start ||
                        (at == best->span.start && token.content.size() > best->token->content.size());
    if (better) best = Match{&token, {at, at + token.content.size()}};
  }
  return best;
}

bool stands_alone(std::string_view text, Span span) {
  // \w as defined for Unicode regular expressions (UTS 18, annex C); PCRE2's \w is narrower.
  static const Regex word_at_start(R"(\A[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])");
  static const Regex word_at_end(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]\z)");
  return !word_at_end.search(text.substr(0, span.start)) && !word_at_start.search(text.substr(span.end));
}

}  // namespace

std::vector<Piece> split_at(std::string_view text, const std::vector<AddedToken>& tokens) {
  static const Regex spaces_at_end(R"(\p{White_Space}*\z)"), spaces_at_start(R"(\A\p{White_Space}*)");
  std::vector<Piece> pieces;
  std::size_t done = 0;  // everything before it is in pieces
  std::size_t searched = 0;
  while (const std::optional<Match> match = find_next(text, searched, tokens)) {
    const auto [token, found] = *match;
    searched = found.end;
    if (token->single_word && !stands_alone(text, found)) continue;
    Span span = found;
    if (token->lstrip) span.start = std::max(done, spaces_at_end.search(text.substr(0, found.start))->start);
    if (token->rstrip) span.end += spaces_at_start.search(text.substr(found.end))->end;
    span.start = std::max(span.start, done);
    if (done < span.start) pieces.push_back({text.substr(done, span.start - done), std::nullopt});
    pieces.push_back({text.substr(span.start, span.end - span.start), token->id});
    done = span.end;
  }
  if (done < text.size()) pieces.push_back({text.substr(done), std::nullopt});
  return pieces;
}

}  // namespace chameleon
