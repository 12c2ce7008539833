// parse_peft on any bytes: it returns factors that a bundle takes or throws a typed error, and nothing else. The
// configuration ends with the first byte 0, which no JSON holds; the tensors follow.

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "chameleon/error.h"
#include "contract/peft_lora.h"

namespace {

/// A bundle of two layers and a tied head, of a vocabulary of 4 and a hidden size of 2.
chameleon::Bundle two_layers() {
  static const std::array<float, 8> head = {0, 1, 2, 3, 4, 5, 6, 7};
  chameleon::Bundle bundle;
  bundle.manifest.model.vocab_size = 4;
  bundle.manifest.token_embedding = {.file = "", .dtype = "float32", .shape = {4, 2}};
  bundle.embedding = std::as_bytes(std::span(head));
  chameleon::AdaptationSpec& spec = bundle.manifest.adaptation;
  spec.regime = "base";
  spec.rank = 8;
  spec.targets = {{"layers.0.q_proj", 2, 3}, {"layers.1.q_proj", 2, 3}, {"lm_head", 2, 4}};
  return bundle;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static const chameleon::Bundle bundle = two_layers();
  const std::string_view content(reinterpret_cast<const char*>(data), size);
  const std::size_t end = std::min(content.find('\0'), size);
  try {
    const auto [set, tokens, digest] =
        chameleon::parse_peft({content.substr(0, end), content.substr(std::min(end + 1, size))}, "peft", bundle);
    const auto widths = bundle.manifest.adaptation.factor_widths();
    if (set.rank < 1 || set.rank > 8 || set.tensors.size() != widths.size()) std::abort();
    for (const auto& [name, values] : set.tensors) {
      if (values.size() != static_cast<std::size_t>(set.rank * widths.at(name))) std::abort();
      if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) std::abort();
    }
    if (!std::ranges::all_of(tokens, [](std::int64_t token) { return token >= 0 && token < 4; })) std::abort();
  } catch (const chameleon::CheckpointError&) {
  } catch (const chameleon::TensorError&) {
  } catch (const chameleon::AdapterError&) {
  }
  return 0;
}
