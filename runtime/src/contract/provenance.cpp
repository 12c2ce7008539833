#include "contract/provenance.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "chameleon/error.h"
#include "contract/mapped_file.h"

namespace chameleon {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kSignatureBytes = 64;
constexpr std::size_t kMaxKeyBytes = 1 << 20;

template <auto Free>
struct Freed {
  template <class T>
  void operator()(T* object) const {
    Free(object);
  }
};
using Bio = std::unique_ptr<BIO, Freed<BIO_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY_free>>;
using Context = std::unique_ptr<EVP_MD_CTX, Freed<EVP_MD_CTX_free>>;

const unsigned char* data_of(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

MappedFile open_key(const fs::path& file) try {
  if (fs::exists(file) && !fs::is_regular_file(file)) throw InputError(file.string() + " is not a file");
  return MappedFile(file);
} catch (const MissingFileError& error) {
  throw InputError(error.what());
}

Key read_public_key(const fs::path& file) {
  const std::string text(open_key(file).text());  // a copy: openssl takes no memory of size zero
  const Bio bio(BIO_new_mem_buf(text.data(), static_cast<int>(std::min<std::size_t>(text.size(), kMaxKeyBytes))));
  if (!bio) throw std::bad_alloc();
  Key key(PEM_read_bio_PUBKEY(bio.get(), nullptr, nullptr, nullptr));
  ERR_clear_error();
  if (!key) {
    throw InputError(file.string() + " is not a public key in PEM: `openssl pkey -in KEY -pubout` writes it");
  }
  if (EVP_PKEY_get_base_id(key.get()) != EVP_PKEY_ED25519) {
    throw InputError(file.string() + " is not an Ed25519 key: make one with `openssl genpkey -algorithm ed25519`");
  }
  return key;
}

bool is_signed_by(const Key& key, std::span<const std::byte> signature, std::span<const std::byte> content) {
  const Context context(EVP_MD_CTX_new());
  if (!context || EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key.get()) != 1) {
    throw std::bad_alloc();  // the only way in which it fails for a key of this kind
  }
  const int result =
      EVP_DigestVerify(context.get(), data_of(signature), signature.size(), data_of(content), content.size());
  ERR_clear_error();
  return result == 1;
}

}  // namespace

void check_signature(std::span<const std::byte> content, const fs::path& signature,
                     std::span<const fs::path> trusted_keys) {
  if (trusted_keys.empty()) {
    throw InputError("trusted_keys is empty: pass at least one public key, or nothing to accept unsigned bundles");
  }
  std::vector<Key> keys;
  for (const fs::path& file : trusted_keys) keys.push_back(read_public_key(file));
  if (!fs::is_regular_file(fs::symlink_status(signature)) || fs::file_size(signature) != kSignatureBytes) {
    throw SignatureError(signature.string() + " is missing or not a signature: get a signed bundle, or sign this one");
  }
  const MappedFile signed_by(signature);
  const auto matches = [&](const Key& key) { return is_signed_by(key, signed_by.bytes(), content); };
  if (std::ranges::none_of(keys, matches)) {
    throw SignatureError(signature.string() + " was not made by a trusted key, or " + signature.stem().string() +
                         " was changed: do not load it");
  }
}

}  // namespace chameleon
