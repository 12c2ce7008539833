// What a Runtime holds, for the parts of the library that work on it.
#pragma once

#include <mutex>

#include "adapters.h"
#include "chameleon/runtime.h"
#include "contract/opening.h"
#include "decode/decoder.h"
#include "decode/session.h"
#include "engine/factor_table.h"

namespace chameleon {

/// Texts as clustering sees them.
struct Embedded {
  std::vector<float> embeddings;          ///< [batch, hidden]
  std::vector<std::int64_t> cluster_ids;  ///< [batch]
};

struct Runtime::Impl {
  Impl(OpeningBundle opening, const LoadOptions& options);

  [[nodiscard]] std::vector<TokenIds> encode(const Texts& texts) const;
  [[nodiscard]] Embedded embed(std::span<const TokenIds> rows) const;
  [[nodiscard]] Adaptation adapt(std::span<const TokenIds> rows, const AdaptOptions& options) const;
  /// The mode of a call. Throws ModeError or InputError.
  [[nodiscard]] Mode check_arguments(std::optional<Mode> chosen, const std::optional<std::vector<std::string>>& tenants,
                                     const std::optional<Factors>& factors, const std::optional<AdapterNames>& names,
                                     std::size_t batch) const;
  /// The source of each row's factors. Factors are made on demand, except those that a caller passed.
  /// embedded: with the caller's vectors in place of embeddings where the hypernetwork reads those
  [[nodiscard]] std::vector<FactorSource> factor_sources(Mode chosen, const Embedded& embedded,
                                                         const std::optional<std::vector<std::string>>& tenants,
                                                         const std::optional<Factors>& factors,
                                                         const std::optional<AdapterNames>& names) const;

  Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "chameleon"};
  Bundle bundle;
  Tokenizer tokenizer;
  mutable Adapters adapters;  // for any number of threads
  Mode mode;
  std::string provider;                        // the one that runs the decoder
  std::optional<std::string> integer_weights;  // of its integer products
  std::unique_ptr<const Decoder> decoder;

 private:
  void open_decoder(const LoadOptions& options);
  [[nodiscard]] FactorSets static_factors(const std::optional<Factors>& factors) const;
  [[nodiscard]] const FactorSets& factors_of_centroids() const;
  [[nodiscard]] FactorSets generate_factors(std::span<const float> conditioning) const;

  Ort::Session hypernetwork{nullptr};
  mutable std::once_flag centroid_factors_once;
  mutable FactorSets centroid_factors;
};

}  // namespace chameleon
