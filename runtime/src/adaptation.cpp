#include "adaptation.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <string_view>

#include "chameleon/error.h"
#include "contract/rotation.h"
#include "factors.h"

namespace chameleon {

namespace {

/// Item i of an array of T at any alignment.
template <class T>
T item_of(std::span<const std::byte> array, std::size_t i) {
  T item;
  std::memcpy(&item, array.data() + i * sizeof(T), sizeof(T));
  return item;
}

/// sums += count * row, of the token embedding as the file stores it: `restore` a sum of int8 rows.
void add_embedding(const Bundle& bundle, std::int64_t id, double count, std::span<double> sums) {
  const std::string& dtype = bundle.manifest.token_embedding.dtype;
  const std::size_t row = static_cast<std::size_t>(id), first = row * sums.size();
  const double scale = dtype == "int8" ? static_cast<double>(item_of<float>(bundle.row_scales, row)) : 1;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const double value = dtype == "int8"      ? static_cast<double>(item_of<std::int8_t>(bundle.embedding, first + i))
                         : dtype == "float16" ? item_of<Ort::Float16_t>(bundle.embedding, first + i).ToFloat()
                                              : item_of<float>(bundle.embedding, first + i);
    sums[i] += count * (value * scale);
  }
}

/// A sum of rows becomes a sum of rows of the token embedding.
void restore(const Bundle& bundle, std::span<double> sums) {
  const auto rotation = bundle.manifest.token_embedding.rotation;
  if (!rotation) return;
  for (std::size_t i = 0; i < sums.size(); ++i)
    sums[i] *= static_cast<double>(item_of<float>(bundle.channel_scales, i));
  rotate(sums, static_cast<std::size_t>(*rotation));
}

std::span<const float> row_of(std::span<const float> matrix, std::size_t row, std::size_t width) {
  return matrix.subspan(row * width, width);
}

}  // namespace

/// Eight interleaved sums over blocks of at most 128 values; a longer array is split into halves whose lengths are
/// multiples of eight.
double pairwise_sum(std::span<const double> values) {
  const std::size_t size = values.size();
  if (size < 8) return std::accumulate(values.begin(), values.end(), 0.0);
  if (size > 128) {
    const std::size_t half = size / 2 - size / 2 % 8;
    return pairwise_sum(values.first(half)) + pairwise_sum(values.subspan(half));
  }
  double lanes[8];
  std::copy_n(values.begin(), 8, lanes);
  std::size_t i = 8;
  for (; i + 8 <= size; i += 8) {
    for (std::size_t lane = 0; lane < 8; ++lane) lanes[lane] += values[i + lane];
  }
  double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (; i < size; ++i) sum += values[i];
  return sum;
}

Blend Blend::parse(const std::string& text) {
  if (text.find('=') == std::string::npos) return text.empty() ? Blend() : Blend(text);
  Blend blend;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(',', start), text.size()), equals = text.find('=', start);
    float weight = 0;
    const char* last = text.data() + end;
    const bool is_pair = equals < end;
    if (!is_pair || std::from_chars(text.data() + equals + 1, last, weight).ptr != last || equals + 1 == end ||
        !blend.weights.emplace(text.substr(start, equals - start), weight).second) {
      throw InputError("adapter '" + text.substr(0, 80) + "': pass NAME, or NAME=WEIGHT,... with each name once");
    }
    start = end + 1;
  }
  return blend;
}

std::vector<float> embed(std::span<const std::vector<std::int64_t>> rows, const Bundle& bundle,
                         std::optional<std::size_t> adapt_tokens) {
  const AdaptationSpec& spec = bundle.manifest.adaptation;
  const auto hidden_size = static_cast<std::size_t>(bundle.manifest.model.hidden_size);
  std::vector<float> embeddings;
  embeddings.reserve(rows.size() * hidden_size);
  std::vector<double> pooled(hidden_size), squares(hidden_size);
  for (const std::vector<std::int64_t>& row : rows) {
    const auto ids = std::span(row).first(std::min(row.size(), adapt_tokens.value_or(row.size())));
    std::ranges::fill(pooled, 0.0);
    for (const std::int64_t id : ids) add_embedding(bundle, id, 1, pooled);
    auto count = static_cast<std::int64_t>(ids.size());
    if (spec.protocol == "paper" && count < spec.max_length) {
      add_embedding(bundle, bundle.manifest.model.eos_token_id, static_cast<double>(spec.max_length - count), pooled);
      count = spec.max_length;
    }
    for (double& value : pooled) value /= static_cast<double>(count);
    restore(bundle, pooled);
    std::ranges::transform(pooled, squares.begin(), [](double value) { return value * value; });
    const double length = std::sqrt(pairwise_sum(squares)) + 1e-8;
    for (const double value : pooled) embeddings.push_back(static_cast<float>(value / length));
  }
  return embeddings;
}

std::vector<std::int64_t> assign(std::span<const float> embeddings, std::span<const float> centroids,
                                 std::size_t hidden_size) {
  std::vector<std::int64_t> cluster_ids(embeddings.size() / hidden_size, -1);
  std::vector<double> squares(hidden_size);
  for (std::size_t row = 0; row < cluster_ids.size(); ++row) {
    double nearest = 0;
    for (std::size_t k = 0; k < centroids.size() / hidden_size; ++k) {
      std::ranges::transform(row_of(embeddings, row, hidden_size), row_of(centroids, k, hidden_size), squares.begin(),
                             [](double e, double mu) { return (e - mu) * (e - mu); });
      const double distance = pairwise_sum(squares);
      if (k == 0 || distance < nearest) {
        nearest = distance;
        cluster_ids[row] = static_cast<std::int64_t>(k);
      }
    }
  }
  return cluster_ids;
}

Conditioning conditioning(Mode mode, std::span<const float> embeddings, std::span<const std::int64_t> cluster_ids,
                          const std::optional<std::vector<std::string>>& tenants) {
  const std::size_t batch = cluster_ids.size(), hidden_size = embeddings.size() / batch;
  Conditioning result{{}, std::vector<std::int64_t>(batch)};
  if (mode == Mode::request) {
    result.vectors.assign(embeddings.begin(), embeddings.end());
    std::iota(result.factor_ids.begin(), result.factor_ids.end(), 0);
    return result;
  }
  std::map<std::pair<std::string, std::int64_t>, std::size_t> group_of;
  std::vector<std::vector<std::size_t>> groups;
  for (std::size_t row = 0; row < batch; ++row) {
    const auto [group, is_new] =
        group_of.try_emplace({tenants ? (*tenants)[row] : std::string(), cluster_ids[row]}, groups.size());
    if (is_new) groups.emplace_back();
    groups[group->second].push_back(row);
    result.factor_ids[row] = static_cast<std::int64_t>(group->second);
  }
  std::vector<double> sums(hidden_size);
  for (const std::vector<std::size_t>& members : groups) {
    std::ranges::fill(sums, 0.0);
    for (const std::size_t row : members) {
      std::ranges::transform(sums, row_of(embeddings, row, hidden_size), sums.begin(), std::plus<double>());
    }
    for (const double sum : sums) {
      result.vectors.push_back(static_cast<float>(sum / static_cast<double>(members.size())));
    }
  }
  return result;
}

Conditioning distinct(const Matrix& vectors) {
  Conditioning result;
  std::map<std::string_view, std::int64_t> number_of;  // by a vector's bytes
  for (std::size_t row = 0; row < vectors.rows; ++row) {
    const std::span<const float> vector = row_of(vectors.values, row, vectors.columns);
    const std::string_view bytes(reinterpret_cast<const char*>(vector.data()), vector.size_bytes());
    const auto [number, is_new] = number_of.try_emplace(bytes, std::ssize(number_of));
    if (is_new) result.vectors.insert(result.vectors.end(), vector.begin(), vector.end());
    result.factor_ids.push_back(number->second);
  }
  return result;
}

void check_conditioning(Mode mode, const std::optional<Matrix>& vectors, std::int64_t size, std::size_t batch) {
  if (vectors.has_value() != (size > 0 && mode == Mode::request)) {
    throw ModeError("mode '" + std::string(to_string(mode)) + "' " + (vectors ? "with" : "without") +
                    " conditioning: this bundle " +
                    (size > 0 ? "needs conditioning in mode 'request', float32 [texts, " + std::to_string(size) + "]"
                              : "takes no conditioning"));
  }
  if (!vectors) return;
  const auto columns = static_cast<std::size_t>(size);
  if (vectors->rows != batch || vectors->columns != columns) {
    throw InputError("conditioning has shape " + shape_text(vectors->rows, vectors->columns) + ", expected " +
                     shape_text(batch, columns) + ": a vector per text");
  }
  if (vectors->values.size() != batch * columns) {
    throw InputError("conditioning has " + std::to_string(vectors->values.size()) + " values for shape " +
                     shape_text(batch, columns));
  }
  if (!std::ranges::all_of(vectors->values, [](float value) { return std::isfinite(value); })) {
    throw InputError("conditioning holds NaN or infinity");
  }
}

void check_tenants(Mode mode, const std::optional<std::vector<std::string>>& tenants, std::size_t batch) {
  if ((mode == Mode::tenant) != tenants.has_value()) {
    throw InputError("mode '" + std::string(to_string(mode)) + "' with tenants " + (tenants ? "given" : "missing") +
                     ": mode 'tenant' needs one tenant per text, other modes take none");
  }
  if (tenants && tenants->size() != batch) {
    throw InputError(std::to_string(tenants->size()) + " tenants for " + std::to_string(batch) +
                     " texts: pass one per text");
  }
}

}  // namespace chameleon
