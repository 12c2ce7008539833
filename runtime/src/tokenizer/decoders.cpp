#include "tokenizer/decoders.h"

#include <array>
#include <optional>
#include <unordered_map>

#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

using Tokens = std::vector<std::string>;

/// The bytes of a token of characters of the byte alphabet; any other token means its own UTF-8.
void append_bytes(const std::string& token, std::string& bytes) {
  static const std::unordered_map<char32_t, char> byte_of = [] {
    std::unordered_map<char32_t, char> bytes_by_character;
    for (std::size_t byte = 0; byte < 256; ++byte) {
      std::size_t at = 0;
      bytes_by_character[next_code_point(byte_alphabet()[byte], at)] = static_cast<char>(byte);
    }
    return bytes_by_character;
  }();
  const std::size_t before = bytes.size();
  for (std::size_t at = 0; at < token.size();) {
    const auto found = byte_of.find(next_code_point(token, at));
    if (found == byte_of.end()) {
      bytes.resize(before);
      bytes += token;
      return;
    }
    bytes += found->second;
  }
}

std::string joined(const Tokens& tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  std::size_t done = 0;
  for (std::size_t at = 0; (at = text.find(from, done)) != std::string_view::npos; done = at + from.size()) {
    result.append(text.substr(done, at - done)).append(to);
  }
  return result.append(text.substr(done));
}

Tokens apply(const ByteLevelDecoder&, Tokens tokens) {
  std::string bytes;
  for (const std::string& token : tokens) append_bytes(token, bytes);
  return {replace_invalid_utf8(bytes)};
}

Tokens apply(const Replace& replace, Tokens tokens) {
  for (std::string& token : tokens) token = replace(token);
  return tokens;
}

/// The byte of a token such as <0x0A>. Rust's parser of numbers also takes a sign, so <0x+A> is one.
std::optional<char> byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return std::nullopt;
  const auto digit = [](char c) {
    const std::size_t value = std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
    return value == std::string_view::npos ? -1 : static_cast<int>(value);
  };
  const int high = token[3] == '+' ? 0 : digit(token[3]), low = digit(token[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(high * 16 + low);
}

Tokens apply(const ByteFallback&, Tokens tokens) {
  Tokens result;
  std::string bytes;  // of the tokens before, which are text together or not at all
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (find_invalid_utf8(bytes)) {
      result.insert(result.end(), bytes.size(), std::string(kReplacement));
    } else {
      result.push_back(bytes);
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    if (const std::optional<char> byte = byte_of_token(token)) {
      bytes += *byte;
    } else {
      flush();
      result.push_back(std::move(token));
    }
  }
  flush();
  return result;
}

Tokens apply(const Fuse&, Tokens tokens) { return {joined(tokens)}; }

Tokens apply(const StripDecoder& strip, Tokens tokens) {
  for (std::string& token : tokens) {
    std::size_t end = 0;
    for (std::int64_t i = 0; i < strip.start && token.compare(end, strip.character.size(), strip.character) == 0; ++i) {
      end += strip.character.size();
    }
    token.erase(0, end);
  }
  return tokens;
}

Tokens apply(const Metaspace& metaspace, Tokens tokens) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const bool is_prefix = i == 0 && metaspace.scheme != PrependScheme::never;
    tokens[i] = replaced(tokens[i], metaspace.replacement, is_prefix ? "" : " ");
  }
  return tokens;
}

std::string cleaned_up(std::string text) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 11> replacements = {{{" .", "."},
                                                                                           {" ?", "?"},
                                                                                           {" !", "!"},
                                                                                           {" ,", ","},
                                                                                           {" ' ", "'"},
                                                                                           {" n't", "n't"},
                                                                                           {" 'm", "'m"},
                                                                                           {" do not", " don't"},
                                                                                           {" 's", "'s"},
                                                                                           {" 've", "'ve"},
                                                                                           {" 're", "'re"}}};
  for (const auto& [from, to] : replacements) text = replaced(text, from, to);
  return text;
}

Tokens apply(const WordPieceDecoder& decoder, Tokens tokens) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0 && tokens[i].starts_with(decoder.prefix)) {
      tokens[i].erase(0, decoder.prefix.size());
    } else if (i > 0) {
      tokens[i].insert(0, " ");
    }
    if (decoder.cleanup) tokens[i] = cleaned_up(std::move(tokens[i]));
  }
  return tokens;
}

}  // namespace

std::string decode_tokens(const std::vector<TokenDecoder>& decoders, std::vector<std::string> tokens) {
  for (const TokenDecoder& decoder : decoders) {
    tokens = std::visit([&](const auto& step) { return apply(step, std::move(tokens)); }, decoder);
  }
  return joined(tokens);
}

}  // namespace chameleon
