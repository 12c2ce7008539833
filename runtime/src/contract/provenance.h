#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

namespace chameleon {

inline constexpr const char* kSignature = "bundle.json.sig";

/// Check that one of the trusted keys signed the content: Ed25519, 64 raw bytes in the file `signature`.
/// Throws SignatureError when none did, InputError for trusted keys that cannot be used.
void check_signature(std::span<const std::byte> content, const std::filesystem::path& signature,
                     std::span<const std::filesystem::path> trusted_keys);

}  // namespace chameleon
