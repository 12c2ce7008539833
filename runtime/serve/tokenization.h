// /tokenize, /detokenize and /tokenizer_info, as lm-evaluation-harness and vLLM have them.
#pragma once

#include "schemas.h"
#include "service.h"

namespace chameleon::serve {

/// An empty text has no tokens, which is no fault here. Throws ApiError.
Json tokenize(const TokenizeRequest& request, const Served& served);
/// Throws ApiError.
Json detokenize(const DetokenizeRequest& request, const Served& served);
Json tokenizer_info(const Served& served);

}  // namespace chameleon::serve
