// check_model on any bytes: it returns or throws a GraphError, and nothing else.

#include <span>

#include "chameleon/error.h"
#include "contract/onnx_operators.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  try {
    chameleon::check_model(std::as_bytes(std::span(data, size)), {{"weights.bin", 1 << 20}}, "decoder.onnx");
  } catch (const chameleon::GraphError&) {
  }
  return 0;
}
