// /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: adapters that come and go while others run.
#pragma once

#include "schemas.h"
#include "service.h"

namespace chameleon::serve {

/// Load a file of the server's directory. Throws ApiError, AdapterError, InputError or TensorError.
Json load(const LoadAdapterRequest& request, Served& served);

/// Forget an adapter; its running rows go on. Throws ApiError or AdapterError.
Json unload(const UnloadAdapterRequest& request, Served& served);

}  // namespace chameleon::serve
