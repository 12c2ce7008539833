#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "chameleon/error.h"

namespace chameleon {

namespace {

constexpr double kUnit = 0x1p34;  // the weight of the highest logit
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// A token that may be chosen.
struct Candidate {
  std::int64_t id;
  float logit;
  double weight;  // an integer, so that sums are exact in any order
};

bool by_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }
bool by_logit(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : by_id(a, b); }
bool by_weight(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : by_id(a, b);
}
double add_weight(double sum, const Candidate& candidate) { return sum + candidate.weight; }

/// Number of candidates in the shortest prefix whose sum of weights fulfils `enough`.
template <class Predicate>
std::size_t prefix_length(std::span<const Candidate> candidates, double sum, const Predicate& enough) {
  const auto last = std::ranges::find_if(candidates, [&](const Candidate& candidate) {
    sum += candidate.weight;
    return enough(sum);
  });
  return static_cast<std::size_t>(last - candidates.begin()) + 1;
}

/// The highest value, or NaN where there is one.
float highest_or_nan(std::span<const float> values) {
  // Lanes, which compilers turn into vector instructions: the maximum of one lane is a chain of dependent comparisons.
  constexpr std::size_t kLanes = 32;
  std::array<float, kLanes> highest;
  highest.fill(-kInfinity);
  int nans = 0;
  const auto take = [&](std::size_t lane, float value) {
    highest[lane] = value > highest[lane] ? value : highest[lane];
    nans += value != value;
  };
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) take(lane, values[i + lane]);
  }
  for (; i < values.size(); ++i) take(0, values[i]);
  return nans > 0 ? std::numeric_limits<float>::quiet_NaN() : std::ranges::max(highest);
}

std::size_t finite_argmax(std::span<const float> logits) {
  const std::size_t best = argmax(logits);
  if (!std::isfinite(logits[best])) {
    throw NumericError("the decoder produced logits that are not finite: check the factors");
  }
  return best;
}

double weight(float logit, double highest, double scale) {
  const double t = std::max((static_cast<double>(logit) - highest) * scale, -25.0 / 512);
  double q = 1 + t * (1 + t * (1.0 / 2 + t * (1.0 / 6 + t * (1.0 / 24))));
  for (int i = 0; i < 9; ++i) q *= q;
  return (q * kUnit + 0x1p52) - 0x1p52;  // rounds to an integer, and unlike std::rint as a vector instruction
}

bool changes_logits(const Sampling& s) {
  return s.repetition_penalty != 1 || s.presence_penalty != 0 || s.frequency_penalty != 0 || !s.logit_bias.empty();
}

/// The logits after steps 1 to 4.
std::vector<float> changed(std::span<const float> raw, const TokenCounts& counts, const Sampling& s,
                           std::span<const bool> allowed) {
  std::vector<float> logits(raw.begin(), raw.end());
  const auto logit_of = [&](std::int64_t id) -> float& { return logits[static_cast<std::size_t>(id)]; };
  for (const auto& [id, bias] : s.logit_bias) logit_of(id) += static_cast<float>(bias);
  for (std::size_t id = 0; id < allowed.size(); ++id) {
    if (!allowed[id]) logits[id] = -kInfinity;
  }
  if (s.repetition_penalty != 1) {
    const auto penalty = static_cast<float>(s.repetition_penalty);
    for (const std::int64_t id : counts.seen()) {
      float& logit = logit_of(id);
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }
  for (const auto& [id, count] : counts.generated()) {
    logit_of(id) -= static_cast<float>(s.presence_penalty + s.frequency_penalty * static_cast<double>(count));
  }
  return logits;
}

/// Keep the shortest prefix by weight whose sum reaches top_p. Only candidates above a bound are sorted; it is lowered
/// until their sum is enough.
void keep_top_p(std::vector<Candidate>& kept, double top_p) {
  const double enough = top_p * std::accumulate(kept.begin(), kept.end(), 0.0, add_weight);
  double sum = 0, bound = kUnit / 16;
  auto sorted = kept.begin(), end = sorted;  // [begin, sorted) is part of the prefix
  for (;; bound /= 16) {
    end = std::partition(sorted, kept.end(), [&](const Candidate& candidate) { return candidate.weight >= bound; });
    const double more = std::accumulate(sorted, end, sum, add_weight);
    if (more >= enough) break;
    sum = more;
    sorted = end;
  }
  std::sort(sorted, end, by_weight);
  const std::size_t more = prefix_length({sorted, end}, sum, [&](double reached) { return reached >= enough; });
  kept.erase(sorted + static_cast<std::ptrdiff_t>(more), kept.end());
}

}  // namespace

void check(const Sampling& sampling, std::int64_t vocab_size) {
  const auto require = [](bool good, const std::string& name, const char* expected) {
    if (!good) throw InputError(name + " is out of range: pass " + expected);
  };
  const double temperature = sampling.temperature, penalty = sampling.repetition_penalty;
  require(temperature == 0 || (temperature >= 1e-5 && std::isfinite(temperature)), "temperature",
          "0, which is greedy, or a finite number of at least 1e-5");
  require(sampling.top_k >= 0, "top_k", "an integer of at least 0 (0 keeps all)");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "top_p", "a number above 0, at most 1 (1 keeps all)");
  require(penalty >= std::numeric_limits<float>::min() && penalty <= std::numeric_limits<float>::max(),
          "repetition_penalty", "a positive number in float32's range (1 changes nothing)");
  const auto is_stop = [](const std::string& stop) {  // counts the bytes that begin a character
    const auto continues = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; };
    const auto bytes = std::ssize(stop);
    return bytes > 0 &&
           bytes - std::ranges::count_if(stop, continues) <= static_cast<std::ptrdiff_t>(kMaxStopCharacters);
  };
  require(sampling.stop.size() <= kMaxStopStrings && std::ranges::all_of(sampling.stop, is_stop), "stop",
          "at most 16 strings of 1 to 1024 characters");
  require(sampling.stop_token_ids.size() <= kMaxStopTokenIds, "stop_token_ids", "at most 1024 token ids");
  require(sampling.logit_bias.size() <= kMaxBiases, "logit_bias",
          "numbers from -100 to 100 by token id, of at most 1024 tokens");
  const char* expected = "a number from -2 to 2 (0 changes nothing)";
  require(std::abs(sampling.presence_penalty) <= 2, "presence_penalty", expected);
  require(std::abs(sampling.frequency_penalty) <= 2, "frequency_penalty", expected);
  require(!sampling.logprobs || (*sampling.logprobs >= 0 && *sampling.logprobs <= kMaxLogprobs), "logprobs",
          "an integer from 0 to 20");
  for (const auto& [id, bias] : sampling.logit_bias) {
    require(id >= 0 && std::abs(bias) <= 100, "logit_bias of token " + std::to_string(id),
            "token ids and numbers from -100 to 100");
    if (id >= vocab_size) {
      throw TokenError("logit_bias: token id " + std::to_string(id) + " is outside the vocabulary of " +
                       std::to_string(vocab_size));
    }
  }
}

TokenCounts::TokenCounts(std::span<const std::int64_t> prompt, std::span<const std::int64_t> generated)
    : seen_(prompt.begin(), prompt.end()) {
  for (const std::int64_t token_id : generated) append(token_id);
}

void TokenCounts::append(std::int64_t token_id) {
  seen_.insert(token_id);
  ++generated_[token_id];
}

Sampler::Sampler(Sampling sampling, std::span<const std::int64_t> prompt, std::uint64_t stream)
    : sampling_(std::move(sampling)), stream_(stream), counts_(prompt) {
  std::ranges::sort(sampling_.stop_token_ids);
}

bool Sampler::is_stop_token(std::int64_t token_id) const {
  return std::ranges::binary_search(sampling_.stop_token_ids, token_id);
}

Choice Sampler::choose(std::span<const float> logits, std::span<const bool> allowed) const {
  const double u = uniform(sampling_.seed, stream_, step_);
  const std::int64_t token_id = chameleon::choose(logits, counts_, sampling_, u, allowed);
  if (!sampling_.logprobs) return {token_id};
  return log_probabilities(logits, token_id, *sampling_.logprobs);
}

void Sampler::append(std::int64_t token_id) {
  ++step_;
  counts_.append(token_id);
}

double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  std::uint64_t z = seed + ((stream << 32) + step + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

std::size_t argmax(std::span<const float> values) {
  // In blocks, so that the index is looked for in one of them only.
  constexpr std::size_t kBlock = 1024;
  std::span<const float> best = values.first(std::min(kBlock, values.size()));
  float highest = -kInfinity;
  for (std::size_t first = 0; first < values.size(); first += kBlock) {
    const auto block = values.subspan(first, std::min(kBlock, values.size() - first));
    const float own = highest_or_nan(block);
    if (own <= highest) continue;
    best = block;
    highest = own;
    if (std::isnan(own)) break;
  }
  const auto found =
      std::ranges::find_if(best, [highest](float value) { return value == highest || std::isnan(value); });
  return static_cast<std::size_t>((best.data() - values.data()) + (found - best.begin()));
}

std::int64_t choose(std::span<const float> logits, const TokenCounts& counts, const Sampling& sampling, double u,
                    std::span<const bool> allowed) {
  std::size_t best = finite_argmax(logits);
  std::vector<float> own;
  if (!allowed.empty() || changes_logits(sampling)) {
    own = changed(logits, counts, sampling, allowed);
    logits = own;
    if (!allowed.empty() && std::ranges::max(logits) == -kInfinity) {  // raw logits were finite
      throw InputError("the mask allows no token of finite logit: allow at least one");
    }
    best = finite_argmax(logits);
  }
  if (sampling.temperature == 0) return static_cast<std::int64_t>(best);

  const double highest = logits[best], scale = 0x1p-9 / sampling.temperature;
  std::vector<Candidate> kept;
  kept.reserve(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    kept.push_back({static_cast<std::int64_t>(id), logits[id], weight(logits[id], highest, scale)});
  }
  if (sampling.top_k > 0 && sampling.top_k < static_cast<std::int64_t>(kept.size())) {
    std::ranges::nth_element(kept, kept.begin() + sampling.top_k, by_logit);
    kept.resize(static_cast<std::size_t>(sampling.top_k));
  }
  if (sampling.top_p < 1) keep_top_p(kept, sampling.top_p);
  if (kept.size() < logits.size()) std::ranges::sort(kept, by_id);
  const double bound = u * std::accumulate(kept.begin(), kept.end(), 0.0, add_weight);
  return kept[prefix_length(kept, 0, [&](double sum) { return sum > bound; }) - 1].id;
}

Choice log_probabilities(std::span<const float> logits, std::int64_t token_id, int count) {
  const double highest = logits[finite_argmax(logits)];
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - highest);
  const double log_total = std::log(total);
  const auto logprob = [&](std::size_t id) {
    return static_cast<float>(static_cast<double>(logits[id]) - highest - log_total);
  };
  Choice choice{token_id, logprob(static_cast<std::size_t>(token_id))};
  std::vector<float> rest(logits.begin(), logits.end());
  for (int i = 0; i < count; ++i) {
    const std::size_t best = argmax(rest);
    if (rest[best] == -kInfinity) break;
    choice.top_logprobs.push_back({static_cast<std::int64_t>(best), logprob(best)});
    rest[best] = -kInfinity;
  }
  return choice;
}

}  // namespace chameleon
