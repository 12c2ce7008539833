#include "device/tensorrt_target.h"

#include <NvInferVersion.h>

#include "device/cuda.h"

namespace chameleon {

EngineTarget current_target() {
  int driver = 0, count = 0;
  // Checked first: TensorRT ends the process where there is no driver.
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) throw ProviderError("no NVIDIA driver: install one");
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    throw ProviderError("the NVIDIA driver lists no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "asking for the GPU's properties");
  const auto numbers = [](std::initializer_list<int> values) {
    std::string text;
    for (const int value : values) text += (text.empty() ? "" : ".") + std::to_string(value);
    return text;
  };
  return {
      .builder = "tensorrt " + numbers({NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD}),
      .device = properties.name,
      .compute_capability = numbers({properties.major, properties.minor}),
      .driver = numbers({driver / 1000, driver % 1000 / 10})};
}

}  // namespace chameleon
