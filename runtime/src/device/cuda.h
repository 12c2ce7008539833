// Memory of a GPU, and CUDA's errors as DeviceError.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "chameleon/error.h"

namespace chameleon {

/// Throws DeviceError for a status other than success.
inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw DeviceError(what + ": " + cudaGetErrorString(status));
}

/// Memory of the current device.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t size) {
    check(cudaMalloc(&address_, std::max<std::size_t>(size, 1)), "allocating memory of the GPU");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : address_(std::exchange(other.address_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(address_, other.address_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(address_); }
  [[nodiscard]] std::byte* at(std::size_t offset = 0) const { return static_cast<std::byte*>(address_) + offset; }

 private:
  void* address_ = nullptr;
};

}  // namespace chameleon
