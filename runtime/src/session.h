// ONNX Runtime: opening a graph with it, and refusing what differs from the manifest.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <stop_token>
#include <string>

#include "chameleon/runtime.h"

namespace chameleon {

/// Throws ProviderError for a provider that this build does not have.
void check_provider(const std::string& provider);

/// A session of one graph. Throws GraphError when the graph does not load or its signature is not the manifest's.
Ort::Session open_session(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph,
                          const LoadOptions& options);

/// A tensor over the caller's memory, which must outlive it. Throws GraphError where the shape needs more memory.
Ort::Value tensor_over(std::span<const std::byte> memory, ONNXTensorElementDataType type,
                       std::initializer_list<std::int64_t> shape);

/// The same for values of a type that is known here. ONNX Runtime reads inputs and writes outputs.
template <class T>
Ort::Value tensor_over(std::span<const T> values, std::initializer_list<std::int64_t> shape) {
  return tensor_over(std::as_bytes(values), Ort::TypeToTensorType<T>::type, shape);
}

/// Session::Run with its errors as GraphError, one of which a stop that is requested meanwhile is.
/// outputs: tensors to write, or empty values that it allocates
void run_session(const Ort::Session& session, const std::stop_token& stop, std::span<const char* const> input_names,
                 std::span<const Ort::Value> inputs, std::span<const char* const> output_names,
                 std::span<Ort::Value> outputs);

}  // namespace chameleon
