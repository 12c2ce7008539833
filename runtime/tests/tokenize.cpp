// A tokenizer.json on what standard input holds, for tests/cpp/tokenizers.py: `chameleon_tokenize FILE
// encode|decode|time`.
//
// Numbers are int32. encode: each text is its number of bytes and the bytes, each answer a number of ids and the ids,
// or -1 for a text that is refused. decode: each row is a number of ids and the ids; the answer is the text of all, and
// then what a stream shows after each, each a number of bytes and the bytes. time: texts as for encode; the answer is
// the seconds of processor time that encoding them all takes, as text.

#include <cstring>
#include <ctime>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "chameleon/error.h"
#include "chameleon/tokenizer.h"
#include "contract/mapped_file.h"

namespace {

std::int32_t read_number(std::string_view& input) {
  std::int32_t number = 0;
  std::memcpy(&number, input.data(), sizeof number);
  input.remove_prefix(sizeof number);
  return number;
}

void append(std::string& output, std::int32_t number) {
  output.append(reinterpret_cast<const char*>(&number), sizeof number);
}

void append(std::string& output, std::string_view text) {
  append(output, static_cast<std::int32_t>(text.size()));
  output += text;
}

std::vector<std::string_view> read_texts(std::string_view input) {
  std::vector<std::string_view> texts;
  while (!input.empty()) {
    const auto size = static_cast<std::size_t>(read_number(input));
    texts.push_back(input.substr(0, size));
    input.remove_prefix(size);
  }
  return texts;
}

std::string encode(const chameleon::Tokenizer& tokenizer, std::string_view input) {
  std::string output;
  for (const std::string_view text : read_texts(input)) {
    try {
      const auto ids = tokenizer.encode(text);
      append(output, static_cast<std::int32_t>(ids.size()));
      for (const std::int64_t id : ids) append(output, static_cast<std::int32_t>(id));
    } catch (const chameleon::InputError&) {
      append(output, -1);
    }
  }
  return output;
}

std::string decode(const chameleon::Tokenizer& tokenizer, std::string_view input) {
  std::string output;
  while (!input.empty()) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(read_number(input)));
    for (std::int64_t& id : ids) id = read_number(input);
    append(output, tokenizer.decode(ids));
    chameleon::DecodeStream stream;
    for (const std::int64_t id : ids) append(output, stream.step(tokenizer, id));
  }
  return output;
}

std::string time(const chameleon::Tokenizer& tokenizer, std::string_view input) {
  const auto texts = read_texts(input);
  const std::clock_t start = std::clock();
  for (const std::string_view text : texts) (void)tokenizer.encode(text);
  return std::to_string(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC) + "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    const chameleon::Tokenizer tokenizer(chameleon::MappedFile(argv[1]).text());
    const std::string input(std::istreambuf_iterator<char>(std::cin), {});
    const std::string_view task = argv[2];
    std::cout << (task == "encode"   ? encode(tokenizer, input)
                  : task == "decode" ? decode(tokenizer, input)
                                     : time(tokenizer, input));
  } catch (const chameleon::Error& error) {
    std::cerr << error.code() << ": " << error.what() << '\n';
    return 2;
  }
}
