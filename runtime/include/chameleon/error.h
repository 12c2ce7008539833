#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "chameleon/export.h"

namespace chameleon {

/// Base of all errors of the library. `code()` is stable and the same as in Python; `what()` says what was wrong,
/// where, and what to do.
class CHAMELEON_EXPORT Error : public std::runtime_error {
 public:
  Error(const char* code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ~Error() override;  // out of line, so that all libraries share one type_info
  [[nodiscard]] const char* code() const noexcept { return code_; }

 private:
  const char* code_;
};

/// A string literal as a template argument.
template <std::size_t N>
struct Word {
  constexpr Word(const char (&text)[N]) {
    for (std::size_t i = 0; i < N; ++i) value[i] = text[i];
  }
  char value[N]{};
};

template <Word Code>
class CHAMELEON_EXPORT CodedError : public Error {
 public:
  explicit CodedError(const std::string& message) : Error(code_word, message) {}
  static constexpr const char* code_word = Code.value;
};

using BundleNotFoundError = CodedError<"bundle_not_found">;
using ManifestError = CodedError<"manifest_invalid">;
using VersionError = CodedError<"version_unsupported">;
using UnknownFileError = CodedError<"file_unknown">;
using MissingFileError = CodedError<"file_missing">;
using PathError = CodedError<"path_unsafe">;
using DigestError = CodedError<"digest_mismatch">;
using TensorError = CodedError<"tensor_invalid">;
using SignatureError = CodedError<"signature_invalid">;
using GraphError = CodedError<"graph_invalid">;
using BundleChangedError = CodedError<"bundle_changed">;
using InputError = CodedError<"input_invalid">;
using TokenError = CodedError<"token_invalid">;
using LengthError = CodedError<"text_too_long">;
using ModeError = CodedError<"mode_unavailable">;
using FactorsError = CodedError<"factors_invalid">;
using AdapterError = CodedError<"adapter_invalid">;
using CheckpointError = CodedError<"checkpoint_invalid">;
using ProviderError = CodedError<"provider_unavailable">;
using DeviceError = CodedError<"device_failed">;
using CancelledError = CodedError<"cancelled">;
using NumericError = CodedError<"not_finite">;
using QueueFullError = CodedError<"queue_full">;
using RateLimitError = CodedError<"rate_limited">;
using ClosedError = CodedError<"closed">;
using RequestError = CodedError<"request_failed">;

}  // namespace chameleon
