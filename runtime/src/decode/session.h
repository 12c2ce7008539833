// ONNX Runtime: opens graphs, refuses those that differ from the manifest, and runs them.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <optional>
#include <stop_token>
#include <string>

#include "chameleon/runtime.h"

namespace chameleon {

/// Throws ProviderError for a provider that this build does not have.
void check_provider(const std::string& provider);

/// The type of weights whose products with uint8 activations ONNX Runtime sums exactly on this machine: "int8" if it
/// can, else "uint8" (chameleon_deploy/runtime/session.py says why). Throws ProviderError if it sums neither exactly.
const std::string& exact_weights(const Ort::Env& env);

/// The same for the integer products of a graph; nothing for a graph without any.
std::optional<std::string> integer_weights(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph);

/// A session of one graph. Throws GraphError when the graph does not load or its inputs and outputs are not those that
/// the manifest lists.
Ort::Session open_session(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph,
                          const LoadOptions& options);

/// A tensor over the caller's memory, which must outlive it. Throws GraphError where the shape needs more memory.
Ort::Value tensor_over(std::span<const std::byte> memory, ONNXTensorElementDataType type,
                       std::initializer_list<std::int64_t> shape);

/// The same for values of type T.
template <class T>
Ort::Value tensor_over(std::span<const T> values, std::initializer_list<std::int64_t> shape) {
  return tensor_over(std::as_bytes(values), Ort::TypeToTensorType<T>::type, shape);
}

/// One tensor of factor sets, [count, rank, width].
inline Ort::Value factor_tensor(const FactorSets& sets, std::span<const float> values) {
  const auto width = static_cast<std::int64_t>(values.size()) / (sets.count * sets.rank);
  return tensor_over(values, {sets.count, sets.rank, width});
}

/// Session::Run, whose errors become GraphError. So does a stop that is requested while it runs.
/// outputs: tensors to write, or empty values that it allocates
void run_session(const Ort::Session& session, const std::stop_token& stop, std::span<const char* const> input_names,
                 std::span<const Ort::Value> inputs, std::span<const char* const> output_names,
                 std::span<Ort::Value> outputs);

}  // namespace chameleon
