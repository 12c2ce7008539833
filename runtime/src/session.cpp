#include "session.h"

#include <onnxruntime_session_options_config_keys.h>

#include <map>

namespace chameleon {

namespace {

using Signature = std::map<std::string, std::pair<std::string, std::vector<Dimension>>>;

Signature expected_signature(const std::vector<TensorSpec>& specs) {
  Signature signature;
  for (const TensorSpec& spec : specs) signature[spec.name] = {spec.dtype, spec.shape};
  return signature;
}

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

std::pair<std::string, std::vector<Dimension>> read_type(const Ort::TypeInfo& type) {
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) return {"not a tensor", {}};
  const auto tensor = type.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> numbers = tensor.GetShape();
  std::vector<const char*> symbols(numbers.size());
  tensor.GetSymbolicDimensions(symbols.data(), symbols.size());
  std::vector<Dimension> shape;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] >= 0) {
      shape.emplace_back(numbers[i]);
    } else {
      shape.emplace_back(std::string(symbols[i]));
    }
  }
  return {dtype_name(tensor.GetElementType()), shape};
}

Signature signature_of(const Ort::Session& session, bool inputs) {
  Ort::AllocatorWithDefaultOptions allocator;
  Signature signature;
  for (std::size_t i = 0; i < (inputs ? session.GetInputCount() : session.GetOutputCount()); ++i) {
    const auto name =
        inputs ? session.GetInputNameAllocated(i, allocator) : session.GetOutputNameAllocated(i, allocator);
    signature[name.get()] = read_type(inputs ? session.GetInputTypeInfo(i) : session.GetOutputTypeInfo(i));
  }
  return signature;
}

void check_signature(const Signature& expected, const Signature& actual, const std::string& where) {
  if (expected == actual) return;
  for (const auto& [name, tensor] : expected) {
    const auto found = actual.find(name);
    if (found == actual.end() || found->second != tensor) {
      throw GraphError(where + " differ from the manifest at '" + name + "'");
    }
  }
  throw GraphError(where + " are more than the manifest lists");
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

Ort::Session open_session(const Ort::Env& env, const Bundle& bundle, const GraphSpec& graph,
                          const LoadOptions& options) {
  Ort::SessionOptions session_options;
  session_options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);  // warnings about initializers help nobody who serves
  // Its patterns are kept for every combination of input shapes ever seen: a server sees a new one at each length.
  session_options.DisableMemPattern();
  if (options.threads.value_or(1) < 1) throw InputError("threads must be at least 1");
  if (options.threads) session_options.SetIntraOpNumThreads(*options.threads);
  // A second spinning thread pool costs the decoder more than it saves here.
  if (graph.role == "hypernetwork") session_options.SetIntraOpNumThreads(1);
  // Idle threads spin for 0.5 ms: long enough to catch the next decode step, short enough not to take the cores from
  // the other session, since decoder and scorer take turns.
  session_options.AddConfigEntry("session.intra_op.spin_duration_us", "500");
  // A scorer's packed weights would be a copy of the head's matrix; as they are they stay in the file.
  if (options.share_weights || graph.role == "scorer") {
    session_options.AddConfigEntry(kOrtSessionOptionsConfigDisablePrepacking, "1");
  }
  const std::string path = (bundle.path / graph.file).string();
  try {
    Ort::Session session(env, path.c_str(), session_options);
    check_signature(expected_signature(graph.inputs), signature_of(session, true), path + ": its inputs");
    check_signature(expected_signature(graph.outputs), signature_of(session, false), path + ": its outputs");
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
    // Run is thread-safe; only the C++ wrapper of it is not marked const.
    const_cast<Ort::Session&>(session).Run(options, input_names.data(), inputs.data(), inputs.size(),
                                           output_names.data(), outputs.data(), outputs.size());
  } catch (const Ort::Exception& error) {
    throw GraphError(std::string("ONNX Runtime failed: ") + error.what());
  }
}

}  // namespace chameleon
