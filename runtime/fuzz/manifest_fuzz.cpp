// parse_manifest on any bytes: it returns a manifest or throws an Error, and nothing else.

#include <string_view>

#include "chameleon/error.h"
#include "chameleon/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  try {
    (void)chameleon::parse_manifest({reinterpret_cast<const char*>(data), size}, "bundle.json");
  } catch (const chameleon::Error&) {
  }
  return 0;
}
