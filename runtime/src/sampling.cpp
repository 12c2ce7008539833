#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "chameleon/error.h"

namespace chameleon {

namespace {

struct Choice {
  double z;
  std::int64_t id;
};

bool before(const Choice& a, const Choice& b) { return a.z != b.z ? a.z > b.z : a.id < b.id; }
bool by_id(const Choice& a, const Choice& b) { return a.id < b.id; }

/// exp(z - highest) of each, and their running sums.
std::vector<double> running_sums(std::span<const Choice> choices, double highest) {
  std::vector<double> sums;
  sums.reserve(choices.size());
  double sum = 0;
  for (const Choice& choice : choices) sums.push_back(sum += std::exp(choice.z - highest));
  return sums;
}

}  // namespace

void check(const Sampling& sampling) {
  const auto require = [](bool good, const char* name) {
    if (!good) throw InputError(std::string(name) + " is out of range");
  };
  const double temperature = sampling.temperature, penalty = sampling.repetition_penalty;
  require(temperature == 0 || (temperature >= 1e-5 && std::isfinite(temperature)), "temperature");
  require(sampling.top_k >= 0, "top_k");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "top_p");
  require(std::isfinite(penalty) && penalty > 0, "repetition_penalty");
  require(std::ranges::none_of(sampling.stop, &std::string::empty), "stop");
}

double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  std::uint64_t z = seed + ((stream << 32) + step + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

std::size_t argmax(std::span<const float> values) {
  // It reads all logits of every step, a megabyte and more, out of a far cache: plain loops, which compilers turn into
  // vector instructions, over blocks, so that only one is read again, and a prefetch across pages, where the
  // processor's own stops. That halves its time.
  constexpr std::size_t kBlock = 2048, kLanes = 32, kAhead = 4096, kCacheLine = 16;
  float best = -std::numeric_limits<float>::infinity();
  auto best_block = values.first(1);
  for (std::size_t start = 0; start < values.size(); start += kBlock) {
    const auto block = values.subspan(start, std::min(kBlock, values.size() - start));
    std::array<float, kLanes> highest;
    highest.fill(best);
    int nans = 0;
    const auto take = [&](std::size_t lane, float value) {
      highest[lane] = value > highest[lane] ? value : highest[lane];
      nans += value != value;
    };
    std::size_t i = 0;
    for (; i + kLanes <= block.size(); i += kLanes) {
      for (std::size_t j = 0; j < kLanes; j += kCacheLine) __builtin_prefetch(block.data() + i + kAhead + j);
      for (std::size_t lane = 0; lane < kLanes; ++lane) take(lane, block[i + lane]);
    }
    for (; i < block.size(); ++i) take(0, block[i]);
    if (nans > 0) {
      best = std::numeric_limits<float>::quiet_NaN();
      best_block = block;
      break;
    }
    if (const float found = std::ranges::max(highest); found > best) {
      best = found;
      best_block = block;
    }
  }
  const auto place = std::ranges::find_if(
      best_block, [best](float value) { return std::isnan(best) ? std::isnan(value) : value == best; });
  return static_cast<std::size_t>(best_block.data() - values.data() + (place - best_block.begin()));
}

std::int64_t choose(std::span<float> logits, std::span<const std::int64_t> seen, const Sampling& sampling, double u) {
  if (sampling.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(sampling.repetition_penalty);
    for (const std::int64_t id : seen) {
      float& logit = logits[static_cast<std::size_t>(id)];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }
  const std::size_t best = argmax(logits);
  if (!std::isfinite(logits[best])) {
    throw NumericError("the decoder produced logits that are not finite: check the factors");
  }
  if (sampling.temperature == 0) return static_cast<std::int64_t>(best);

  std::vector<Choice> kept;
  kept.reserve(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    kept.push_back({static_cast<double>(logits[id]) / sampling.temperature, static_cast<std::int64_t>(id)});
  }
  const double highest = kept[best].z;
  if (sampling.top_k > 0 && sampling.top_k < static_cast<std::int64_t>(kept.size())) {
    std::ranges::nth_element(kept, kept.begin() + sampling.top_k, before);
    kept.resize(static_cast<std::size_t>(sampling.top_k));
    std::ranges::sort(kept, by_id);
  }
  if (sampling.top_p < 1) {
    std::ranges::sort(kept, before);
    const std::vector<double> sums = running_sums(kept, highest);
    const auto last = std::ranges::lower_bound(sums, sampling.top_p * sums.back());
    kept.resize(static_cast<std::size_t>(last - sums.begin()) + 1);
    std::ranges::sort(kept, by_id);
  }
  const std::vector<double> sums = running_sums(kept, highest);
  const auto drawn = std::ranges::upper_bound(sums, u * sums.back()) - sums.begin();
  return kept[std::min(static_cast<std::size_t>(drawn), kept.size() - 1)].id;
}

}  // namespace chameleon
