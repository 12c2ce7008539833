// What a Runtime holds, for the parts of the library that work on it.
#pragma once

#include "chameleon/runtime.h"
#include "contract/opening.h"
#include "decode/decoder.h"
#include "encoder.h"
#include "factor_sources.h"

namespace chameleon {

/// What runs the graphs of a bundle.
struct Backend {
  std::string provider;                        ///< the one that runs the decoder
  std::optional<std::string> integer_weights;  ///< of its integer products
  std::unique_ptr<const Decoder> decoder;
};

struct Runtime::Impl {
  Impl(OpeningBundle opening, const LoadOptions& options);

  [[nodiscard]] std::vector<TokenIds> encode(const Texts& texts) const;

  Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "chameleon"};
  Bundle bundle;
  Tokenizer tokenizer;
  Backend backend;
  std::unique_ptr<const Encoder> encoder;  ///< null in a bundle without
  FactorSources sources;
};

}  // namespace chameleon
