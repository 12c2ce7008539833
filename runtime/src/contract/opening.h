// Opening a bundle while something else is done: the digest of the weights takes most of the time.
#pragma once

#include <future>

#include "chameleon/bundle.h"

namespace chameleon {

/// A bundle all of whose checks have passed, except that the digest of the weights is still being computed.
struct OpeningBundle {
  Bundle bundle;
  std::shared_future<void> weights_checked;

  /// Wait for the digest of the weights. Throws DigestError if it differs from the manifest's. Call this before
  /// anything that was computed from the weights is returned.
  void require_weights() const { weights_checked.get(); }
};

/// As open_bundle, but the weights are hashed in the background, while the caller opens sessions.
OpeningBundle start_opening(const std::filesystem::path& path, const TrustedKeys& trusted_keys = {});

}  // namespace chameleon
