#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "chameleon/factors.h"
#include "chameleon/manifest.h"
#include "chameleon/per_prompt.h"

namespace chameleon {

/// How a batch was adapted.
struct Adaptation {
  std::vector<float> embeddings;          ///< [batch, hidden], text embeddings of unit length
  std::vector<std::int64_t> cluster_ids;  ///< [batch], nearest centroid; -1 in a bundle without centroids
  RowFactors factors;                     ///< the factor sets of the batch, and the set that each row uses
};

/// The weighted sum of the updates of adapters: a name alone has the weight 1, and nothing is the base model.
struct Blend {
  std::map<std::string, float> weights;  ///< by the adapters' names, finite

  Blend() = default;
  Blend(std::nullopt_t /*base*/) {}
  Blend(const char* name) : weights{{name, 1.0F}} {}
  Blend(std::string name) : weights{{std::move(name), 1.0F}} {}
  Blend(std::map<std::string, float> by_name) : weights(std::move(by_name)) {}
  Blend(std::initializer_list<std::pair<const std::string, float>> by_name) : weights(by_name) {}
  /// A name, or weights by name such as "legal=0.7,code=0.3"; "" is the base model. Throws InputError.
  [[nodiscard]] CHAMELEON_EXPORT static Blend parse(const std::string& text);
};

/// Options of one call: its adaptation mode, and the arguments that this mode needs. Matrices need to be valid during
/// the call only.
struct Adapt {
  std::optional<Mode> mode{};                         ///< the runtime's mode by default
  std::optional<std::vector<std::string>> tenants{};  ///< mode tenant: the owner of each text, one per text
  std::optional<Factors> factors{};                   ///< mode static: the caller's factor set
  std::optional<std::vector<Blend>> adapters{};       ///< mode static, which they imply: one per text
  /// Mode request of a bundle whose hypernetwork reads vectors of the caller: [texts, conditioning_size], such as the
  /// embedding of each text's task.
  std::optional<Matrix> conditioning{};
  std::optional<std::size_t> adapt_tokens{};  ///< embed only this many leading tokens of every text
  /// Mode request of a bundle with a sentence encoder, in the place of conditioning: a description of the task, such as
  /// "answer like a lawyer", for all texts or one per text.
  std::optional<PerPrompt<std::string>> adapt_text{};
};

}  // namespace chameleon
