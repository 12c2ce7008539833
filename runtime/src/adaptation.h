// Embedding, clustering and conditioning of a batch (DESIGN sections 2 and 3).
//
// Sums run in float64 and in numpy's order, then round to float32 once: Python gets the same conditioning vectors to
// the last bit, and with them the same factors.
#pragma once

#include "chameleon/adaptation.h"

namespace chameleon {

/// e = p / (||p|| + 1e-8), p the mean token embedding of a row.  -> [batch, hidden]
/// Protocol `paper` pools the EOS padding up to max_length too.
std::vector<float> embed(std::span<const std::vector<std::int64_t>> rows, const Bundle& bundle);

/// argmin_k ||e - mu_k||^2, ties to the lowest k; -1 where there are no centroids.  -> [batch]
std::vector<std::int64_t> assign(std::span<const float> embeddings, std::span<const float> centroids,
                                 std::size_t hidden_size);

/// What the hypernetwork is fed, and which of its outputs each row uses.
struct Conditioning {
  std::vector<float> vectors;            ///< [clusters, hidden], in order of first appearance
  std::vector<std::int64_t> factor_ids;  ///< [batch]
};

/// In a mode that depends on the texts themselves: request, cohort or tenant.
Conditioning conditioning(Mode mode, std::span<const float> embeddings, std::span<const std::int64_t> cluster_ids,
                          const std::optional<std::vector<std::string>>& tenants);

/// The factor sets that `cluster_ids` name, ascending, and which of them each row uses.
std::pair<FactorSets, std::vector<std::int64_t>> select(const FactorSets& all,
                                                        std::span<const std::int64_t> cluster_ids);

/// Throws InputError unless tenants are given exactly in mode `tenant`, one per row.
void check_tenants(Mode mode, const std::optional<std::vector<std::string>>& tenants, std::size_t batch);

/// A caller's pair as one factor set. Throws FactorsError.
FactorSets check_factors(const Factors& factors, const ModelSpec& model);

}  // namespace chameleon
