// The one place that turns (mode, tenants, factors, adapters, conditioning) into factors.
#pragma once

#include <mutex>

#include "adaptation.h"
#include "adapters.h"
#include "decode/decoder.h"
#include "decode/session.h"
#include "encoder.h"

namespace chameleon {

/// Texts as clustering sees them.
struct Embedded {
  std::vector<float> embeddings;          ///< [batch, hidden]
  std::vector<std::int64_t> cluster_ids;  ///< [batch]
};

/// The sources of the factors of a call's rows.
struct RowSources {
  std::vector<FactorSource> sources;     ///< of each set
  std::vector<std::int64_t> factor_ids;  ///< [batch], which of them each row has
  std::function<FactorSets()> make_all;  ///< a stack of all sets, made at once
  std::vector<std::int64_t> starts{};    ///< see RowFactors
};

/// Embeds and clusters texts, and says what their factors are made of. For any number of threads.
class FactorSources {
 public:
  /// bundle: must outlive this
  /// hypernetwork: its session, or null
  /// provider: of the decoder
  /// encoder: of descriptions, which must outlive this, or null
  /// mode: of calls that name none, or nothing for the bundle's
  /// Throws ModeError for a mode that the bundle cannot serve.
  FactorSources(const Bundle& bundle, Ort::Session hypernetwork, std::string provider, const Encoder* encoder,
                std::optional<Mode> mode, std::optional<std::size_t> max_adapter_bytes);

  /// The options of a call of so many texts with its mode, and descriptions as the vectors that they stand for. Throws
  /// ModeError or InputError for options that do not fit the bundle or the texts, and what Encoder::conditioning
  /// throws.
  [[nodiscard]] Adapt resolve(const Adapt& adapt, std::size_t batch) const;
  [[nodiscard]] Embedded embed(std::span<const TokenIds> rows, const Adapt& adapt) const;
  /// The same, without the embeddings of a bundle that has no clusters and no hypernetwork.
  [[nodiscard]] Embedded embed_for_factors(std::span<const TokenIds> rows, const Adapt& adapt) const;
  /// Embed and cluster rows, and make their factors.
  [[nodiscard]] Adaptation adapt(std::span<const TokenIds> rows, const Adapt& adapt) const;
  /// The sources of the factors of rows, which must not outlive this. A caller's matrices are copied.
  /// adapt: from `resolve`
  /// rows: their tokens
  /// Throws ModeError, FactorsError, AdapterError, or ProviderError for activated adapters where there are none.
  [[nodiscard]] RowSources of_rows(const Adapt& adapt, Rows rows, const Embedded& embedded) const;

  /// Of the bundle, and loaded from files.
  [[nodiscard]] Adapters& adapters() const { return adapters_; }

 private:
  [[nodiscard]] Matrix described(Mode mode, const PerPrompt<std::string>& descriptions, std::size_t batch) const;
  [[nodiscard]] RowSources of_adapters(std::span<const Blend> blends, Rows rows) const;
  [[nodiscard]] FactorSets static_factors(const std::optional<Factors>& factors) const;
  [[nodiscard]] const FactorSets& factors_of_centroids() const;
  [[nodiscard]] FactorSets generate(std::span<const float> vectors) const;

  const Bundle& bundle_;
  const AdaptationSpec& spec_;
  Ort::Session hypernetwork_;
  std::string provider_;
  const Encoder* encoder_;
  Mode mode_;
  mutable Adapters adapters_;  // which has a lock of its own
  FactorSets no_factors_;      // the decoder has factor inputs in every mode
  mutable std::once_flag centroid_factors_once_;
  mutable FactorSets centroid_factors_;
};

}  // namespace chameleon
