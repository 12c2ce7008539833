#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "chameleon/bundle.h"

namespace chameleon {

/// The factors of a batch.
struct Adaptation {
  std::vector<float> embeddings;          ///< [batch, hidden], text embeddings of length one
  std::vector<std::int64_t> cluster_ids;  ///< [batch], nearest centroid; -1 in a bundle without centroids
  FactorSets factors;                     ///< lora_A, lora_B
  std::vector<std::int64_t> factor_ids;   ///< [batch], which factor set each row uses: the decoder's `cluster_ids`
};

/// A caller's pair, of any rank, alpha already in it. The values are copied.
struct Factors {
  std::int64_t rank = 0;
  std::span<const float> lora_A;  ///< [rank, hidden]
  std::span<const float> lora_B;  ///< [rank, vocab]
};

/// How a batch is adapted.
struct AdaptOptions {
  std::optional<Mode> mode{};                         ///< by default the runtime's
  std::optional<std::vector<std::string>> tenants{};  ///< mode tenant: who each text belongs to, one per text
  std::optional<Factors> factors{};                   ///< mode static
};

}  // namespace chameleon
