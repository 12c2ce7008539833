#include "texts.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "chameleon/error.h"
#include "tokenizer/utf8.h"

using chameleon::InputError;

namespace {

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || std::filesystem::is_directory(path)) {
    throw InputError("cannot read " + path.string() + ": " + std::strerror(errno != 0 ? errno : EISDIR));
  }
  if (const auto offset = chameleon::find_invalid_utf8(content)) {
    throw InputError(path.string() + ": not UTF-8 at byte " + std::to_string(*offset) + "; convert the file first");
  }
  return content;
}

/// Whether Python's str.isspace holds for a whole text, or the text is empty.
bool is_blank(std::string_view text) {
  for (std::size_t offset = 0; offset < text.size();) {
    const char32_t c = chameleon::next_code_point(text, offset);
    const bool space = (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
                       (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
                       c == 0x3000;
    if (!space) return false;
  }
  return true;
}

std::string text_of_line(std::string_view line, const std::string& where) {
  try {
    const auto text = nlohmann::json::parse(line).at("text").get<std::string>();
    if (!text.empty()) return text;
  } catch (const nlohmann::json::exception&) {
    throw InputError(where + ": expected a JSON object with a string \"text\"");
  }
  throw InputError(where + ": \"text\" must be a string that is not empty");
}

std::vector<std::string> lines_of(const std::string& content, const std::filesystem::path& path) {
  std::vector<std::string> texts;
  std::size_t number = 0;
  for (std::size_t start = 0; start < content.size();) {
    const std::size_t end = std::min(content.find('\n', start), content.size());
    const auto line = std::string_view(content).substr(start, end - start);
    ++number;
    if (!is_blank(line)) texts.push_back(text_of_line(line, path.string() + ", line " + std::to_string(number)));
    start = end + 1;
  }
  return texts;
}

std::vector<std::string> paragraphs_of(std::string_view content) {
  std::vector<std::string> texts;
  const auto take = [&](std::string_view block) {
    if (is_blank(block)) return;
    const std::size_t first = block.find_first_not_of("\r\n");
    texts.emplace_back(block.substr(first, block.find_last_not_of("\r\n") - first + 1));
  };
  std::size_t start = 0;
  for (std::size_t newline = content.find('\n'); newline != std::string_view::npos;) {
    const std::size_t next = content.find_first_not_of(" \t\r", newline + 1);
    if (next != std::string_view::npos && content[next] == '\n') {
      take(content.substr(start, newline - start));
      start = next + 1;
      newline = content.find('\n', start);
    } else {
      newline = content.find('\n', newline + 1);
    }
  }
  take(content.substr(start));
  return texts;
}

}  // namespace

std::vector<std::string> read_texts(const std::filesystem::path& path) {
  const std::string content = read_file(path);
  std::vector<std::string> texts = path.extension() == ".jsonl" ? lines_of(content, path) : paragraphs_of(content);
  if (texts.empty()) throw InputError(path.string() + ": holds no text");
  return texts;
}
