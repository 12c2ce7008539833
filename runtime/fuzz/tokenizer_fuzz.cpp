// The tokenizer on any bytes. As a text: invalid UTF-8 is refused, everything else decodes back to itself. As a
// tokenizer.json: it is read, or refused with an Error.

#include <cstdlib>
#include <string>
#include <string_view>

#include "chameleon/error.h"
#include "chameleon/tokenizer.h"
#include "contract/mapped_file.h"
#include "tokenizer/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static const chameleon::Tokenizer tokenizer(chameleon::MappedFile(CHAMELEON_TOKENIZER).text());
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const auto ids = tokenizer.encode(text);
    // decode skips special tokens; any other text must be unchanged.
    if (text.find("<|endoftext|>") == std::string_view::npos && tokenizer.decode(ids) != text) std::abort();
  } catch (const chameleon::InputError&) {
    if (!chameleon::find_invalid_utf8(text)) std::abort();
  }
  try {
    const chameleon::Tokenizer other(text);
    (void)other.decode(other.encode("The river's 12 banks.  \n"));
  } catch (const chameleon::Error&) {
  }
  return 0;
}
