#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/factors.h"
#include "chameleon/manifest.h"

namespace chameleon {

/// How a batch was adapted.
struct Adaptation {
  std::vector<float> embeddings;          ///< [batch, hidden], text embeddings of unit length
  std::vector<std::int64_t> cluster_ids;  ///< [batch], nearest centroid; -1 in a bundle without centroids
  RowFactors factors;                     ///< the factor sets of the batch, and the set that each row uses
};

/// The name of each text's adapter, nothing for the base model.
using AdapterNames = std::vector<std::optional<std::string>>;

/// Options of one call: its adaptation mode, and the arguments that this mode needs. Matrices need to be valid during
/// the call only.
struct Adapt {
  std::optional<Mode> mode{};                         ///< the runtime's mode by default
  std::optional<std::vector<std::string>> tenants{};  ///< mode tenant: the owner of each text, one per text
  std::optional<Factors> factors{};                   ///< mode static: the caller's factor set
  std::optional<AdapterNames> adapters{};             ///< mode static, which they imply: one per text
  /// Mode request of a bundle whose hypernetwork reads vectors of the caller: [texts, conditioning_size], such as the
  /// embedding of each text's task.
  std::optional<Matrix> conditioning{};
  std::optional<std::size_t> adapt_tokens{};  ///< embed only this many leading tokens of every text
};

}  // namespace chameleon
