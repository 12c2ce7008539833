// Embedding, clustering and conditioning of a batch (docs/design.md, sections 2 and 3).
//
// Sums run in float64 and in numpy's order, then round to float32 once: conditioning vectors and factors equal Python's
// bit by bit.
#pragma once

#include "chameleon/adaptation.h"
#include "chameleon/bundle.h"

namespace chameleon {

/// Text embeddings [batch, hidden]: e = p / (||p|| + 1e-8), where p is the mean token embedding of a row.
/// Protocol `paper` also pools the EOS padding up to max_length.
/// adapt_tokens: how many leading tokens of a row are embedded; nothing for all
std::vector<float> embed(std::span<const std::vector<std::int64_t>> rows, const Bundle& bundle,
                         std::optional<std::size_t> adapt_tokens = {});

/// Numpy's pairwise summation over a contiguous axis.
double pairwise_sum(std::span<const double> values);

/// The nearest centroid of each row, [batch]: argmin_k ||e - mu_k||^2, ties to the lowest k; -1 without centroids.
std::vector<std::int64_t> assign(std::span<const float> embeddings, std::span<const float> centroids,
                                 std::size_t hidden_size);

/// The input of the hypernetwork, and the factor set that each row uses.
struct Conditioning {
  std::vector<float> vectors;            ///< [factor_sets, hypernetwork_width], in order of first appearance
  std::vector<std::int64_t> factor_ids;  ///< [batch]
};

/// Conditioning in a mode that depends on the texts themselves: request, cohort or tenant.
Conditioning conditioning(Mode mode, std::span<const float> embeddings, std::span<const std::int64_t> cluster_ids,
                          const std::optional<std::vector<std::string>>& tenants);

/// The same where the caller gives the vectors [batch, conditioning_size]: equal ones share a factor set.
Conditioning distinct(const Matrix& vectors);

/// Throws ModeError unless vectors are given exactly in mode `request` of a bundle that takes them, InputError for
/// another shape, NaN or infinity.
/// size: AdaptationSpec::conditioning_size
void check_conditioning(Mode mode, const std::optional<Matrix>& vectors, std::int64_t size, std::size_t batch);

/// Throws InputError unless tenants are given exactly in mode `tenant`, one per row.
void check_tenants(Mode mode, const std::optional<std::vector<std::string>>& tenants, std::size_t batch);

}  // namespace chameleon
