#include "decode/session.h"

#include <onnxruntime_session_options_config_keys.h>

#include <algorithm>
#include <array>

#include "contract/precision.h"
#include "contract/signature.h"
#include "integer_products.h"

namespace chameleon {

namespace {

std::string dtype_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return "int64";
    default:
      return "ONNX type " + std::to_string(type);
  }
}

TensorSpec read_tensor(const std::string& name, const Ort::TypeInfo& type) {
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) return {name, "not a tensor", {}};
  const auto tensor = type.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> numbers = tensor.GetShape();
  std::vector<const char*> symbols(numbers.size());
  tensor.GetSymbolicDimensions(symbols.data(), symbols.size());
  TensorSpec spec{name, dtype_name(tensor.GetElementType()), {}};
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] >= 0) {
      spec.shape.emplace_back(numbers[i]);
    } else {
      spec.shape.emplace_back(std::string(symbols[i]));
    }
  }
  return spec;
}

std::vector<TensorSpec> inputs_of(const Ort::Session& session) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<TensorSpec> inputs;
  for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
    inputs.push_back(read_tensor(session.GetInputNameAllocated(i, allocator).get(), session.GetInputTypeInfo(i)));
  }
  return inputs;
}

std::vector<TensorSpec> outputs_of(const Ort::Session& session) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<TensorSpec> outputs;
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
    outputs.push_back(read_tensor(session.GetOutputNameAllocated(i, allocator).get(), session.GetOutputTypeInfo(i)));
  }
  return outputs;
}

void check_listed(const std::vector<TensorSpec>& listed, const std::vector<TensorSpec>& actual,
                  const std::string& where) {
  if (const auto found = difference(listed, actual)) throw GraphError(where + " differ from the manifest: " + *found);
}

/// Let ONNX Runtime make uint8 weights of the graph's int8 ones.
void convert_weights(Ort::SessionOptions& options) { options.AddConfigEntry(kOrtSessionOptionsAvx2PrecisionMode, "1"); }

/// Whether the sums of kIntegerProducts are right, of one row, which has kernels of its own, and of several.
bool are_exact(const Ort::Env& env, const std::string& weights) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  if (weights == "uint8") convert_weights(options);
  try {
    Ort::Session session(env, kIntegerProducts, sizeof kIntegerProducts, options);
    constexpr std::array input_names{"activations"}, output_names{"sums"};
    for (const std::int64_t rows : {1, 8}) {
      const std::vector<std::uint8_t> activations(static_cast<std::size_t>(rows) * 64, 255);
      const std::array inputs{tensor_over(std::span(activations), {rows, 64})};
      std::array<Ort::Value, 1> outputs{Ort::Value(nullptr)};
      run_session(session, {}, input_names, inputs, output_names, outputs);
      const std::span sums(outputs[0].GetTensorData<float>(), static_cast<std::size_t>(rows) * 32);
      for (std::size_t i = 0; i < sums.size(); ++i) {
        if (sums[i] != 64 * 127 * (i % 2 == 0 ? 127 : -128)) return false;
      }
    }
  } catch (const Ort::Exception& error) {
    throw GraphError(std::string("ONNX Runtime cannot load its integer products: ") + error.what());
  }
  return true;
}

}  // namespace

void check_provider(const std::string& provider) {
  if (provider == "cpu" || provider == "auto") return;
#ifdef CHAMELEON_WITH_TENSORRT
  if (provider == "tensorrt") return;
#endif
  throw ProviderError("provider '" + provider + "' is not available; this build has: cpu, auto" +
                      (provider == "tensorrt" ? "; configure it with -DCHAMELEON_TENSORRT_ROOT=" : ""));
}

const std::string& exact_weights(const Ort::Env& env) {
  static const std::string exact = [&env] {
    for (const char* weights : {"int8", "uint8"}) {
      if (are_exact(env, weights)) return weights;
    }
    throw ProviderError(
        "ONNX Runtime sums integer products wrongly on this processor, with int8 weights and with uint8: export with "
        "--precision fp32");
  }();
  return exact;
}

std::optional<std::string> integer_weights(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph) {
  if (!is_integer(bundle.manifest.precision) || graph.providers != std::vector<std::string>{"cpu"}) return std::nullopt;
  return exact_weights(env);
}

Ort::Session open_session(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph,
                          const LoadOptions& options) {
  Ort::SessionOptions session_options;
  session_options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);  // its warnings are about initializers, not for users
  // ONNX Runtime keeps a memory pattern for every combination of input shapes: a server sees a new one at each length.
  session_options.DisableMemPattern();
  // On Arm processors with SME these kernels clamp what overflows to the largest float32, so that nobody would see it.
  session_options.AddConfigEntry("mlas.disable_kleidiai", "1");
  if (options.threads.value_or(1) < 1) throw InputError("threads must be at least 1");
  if (options.threads) session_options.SetIntraOpNumThreads(*options.threads);
  // A second spinning thread pool slows the decoder down more than it speeds up the hypernetwork.
  if (graph.role == "hypernetwork") session_options.SetIntraOpNumThreads(1);
  if (graph.role == "encoder") {  // its threads do not spin beside the decoder's
    session_options.AddConfigEntry("session.intra_op.allow_spinning", "0");
  }
  // Idle threads spin for 0.5 ms: long enough to catch the next decode step, short enough not to take the cores from
  // the other session, since decoder and scorer take turns.
  session_options.AddConfigEntry("session.intra_op.spin_duration_us", "500");
  const bool is_scorer = graph.role == "hidden_scorer";
  if (integer_weights(env, bundle, graph) == "uint8") {
    convert_weights(session_options);  // into a copy, in whose place packed ones take no more memory
  } else if (options.map_weights || is_scorer) {
    // Packed or transposed while the session opens, the scorer's weights would be a second copy of the head's matrix.
    // Done in every call, they stay in the mapped file. In int8 transposing costs a call 6 ms of processor time (GPT-2
    // small).
    session_options.AddConfigEntry(kOrtSessionOptionsConfigDisablePrepacking, "1");
    if (is_scorer) {
      session_options.AddConfigEntry(kOrtSessionOptionsDisableSpecifiedOptimizers, "ConstantFolding");
    }
  }
  const std::string path = (bundle.path / graph.file).string();
  try {
    Ort::Session session(env, path.c_str(), session_options);
    check_listed(graph.inputs, inputs_of(session), path + ": its inputs");
    check_listed(graph.outputs, outputs_of(session), path + ": its outputs");
    return session;
  } catch (const Ort::Exception& error) {
    throw GraphError(path + ": ONNX Runtime cannot load it: " + error.what());
  }
}

Ort::Value tensor_over(std::span<const std::byte> memory, ONNXTensorElementDataType type,
                       std::initializer_list<std::int64_t> shape) {
  static const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  try {
    return Ort::Value::CreateTensor(host, const_cast<std::byte*>(memory.data()), memory.size(), shape.begin(),
                                    shape.size(), type);
  } catch (const Ort::Exception& error) {
    throw GraphError(std::string("a tensor does not fit its memory: ") + error.what());
  }
}

void run_session(const Ort::Session& session, const std::stop_token& stop, std::span<const char* const> input_names,
                 std::span<const Ort::Value> inputs, std::span<const char* const> output_names,
                 std::span<Ort::Value> outputs) {
  Ort::RunOptions options;
  const std::stop_callback terminate(stop, [&options] { options.SetTerminate(); });
  try {
    // Run is thread-safe, but the C++ wrapper is not marked const.
    const_cast<Ort::Session&>(session).Run(options, input_names.data(), inputs.data(), inputs.size(),
                                           output_names.data(), outputs.data(), outputs.size());
  } catch (const Ort::Exception& error) {
    throw GraphError(std::string("ONNX Runtime failed: ") + error.what());
  }
}

}  // namespace chameleon
