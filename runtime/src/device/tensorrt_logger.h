#pragma once

#include <NvInferRuntime.h>

#include <mutex>
#include <string>

namespace chameleon {

/// Keeps TensorRT's last error, to be told in the exception that follows it.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard lock(mutex_);
    last_ = message;
  }
  [[nodiscard]] std::string last() const {
    const std::lock_guard lock(mutex_);
    return last_.empty() ? "no reason was logged" : last_;
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

}  // namespace chameleon
