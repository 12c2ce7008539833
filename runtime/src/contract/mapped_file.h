#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "chameleon/bundle.h"

struct stat;

namespace chameleon {

/// A file mapped into read-only memory. Pages are loaded when touched, and shared with all other mappings of the file.
class MappedFile {
 public:
  /// Throws MissingFileError when the file cannot be opened.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }
  [[nodiscard]] std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  /// Of the file when it was opened.
  [[nodiscard]] const FileStamp& stamp() const { return stamp_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  FileStamp stamp_{};
};

FileStamp stamp_of(const struct stat& status);

/// SHA-256 in lowercase hexadecimal.
std::string sha256(std::span<const std::byte> bytes);

}  // namespace chameleon
