// parse_safetensors on any bytes: it returns tensors that lie inside them or throws a TensorError, and nothing else.

#include <cstdlib>

#include "chameleon/error.h"
#include "contract/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  try {
    const std::string_view content(reinterpret_cast<const char*>(data), size);
    for (const auto& [name, tensor] : chameleon::parse_safetensors(content, "file").tensors) {
      if (tensor.bytes.data() < content.data() || tensor.bytes.data() + tensor.bytes.size() > content.data() + size) {
        std::abort();
      }
      (void)tensor.floats(tensor.shape, name);
    }
  } catch (const chameleon::TensorError&) {
  }
  return 0;
}
