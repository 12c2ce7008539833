#include "adapters.h"

#include <algorithm>
#include <bit>
#include <ranges>

#include "chameleon/error.h"
#include "contract/basis.h"
#include "contract/peft_lora.h"

namespace chameleon {

namespace {

constexpr std::size_t kNamesShown = 10;  // in a message

std::size_t bytes_of(const FactorSets& sets) {
  std::size_t bytes = 0;
  for (const auto& [name, values] : sets.tensors) bytes += values.size_bytes();
  return bytes;
}

}  // namespace

Adapters::Adapters(const Bundle& bundle, std::optional<std::size_t> max_bytes)
    : bundle_(bundle), max_bytes_(max_bytes) {
  const FactorSets& own = bundle.lora;
  for (const std::string& name : bundle.manifest.adaptation.adapters) {
    FactorSets set{1, own.rank, {}, own.owner};
    for (const auto& [tensor, values] : own.tensors) {
      const std::size_t size = values.size() / static_cast<std::size_t>(own.count);
      set.tensors[tensor] = values.subspan(next_number_ * size, size);
    }
    const FactorSets entered = enter_basis(set, bundle.basis);
    const auto& all = bundle.manifest.adaptation.invocation_tokens;
    const auto tokens = all.find(name);
    adapters_[name] = {next_number_, next_number_, {}, entered, info(name, entered, {})};
    if (tokens != all.end()) adapters_[name].invocation_tokens = tokens->second;
    ++next_number_;
  }
}

std::vector<AdapterInfo> Adapters::list() const {
  const std::lock_guard lock(mutex_);
  std::map<std::uint64_t, AdapterInfo> by_place;
  for (const auto& [name, adapter] : adapters_) by_place[adapter.place] = adapter.info;
  std::vector<AdapterInfo> list;
  for (auto& [place, adapter] : by_place) list.push_back(std::move(adapter));
  return list;
}

void Adapters::load(const std::string& name, const std::filesystem::path& path, bool replace) {
  if (!is_adapter_name(name)) {
    throw InputError("'" + name.substr(0, 80) + "' cannot name an adapter: use " + std::string(kAdapterName));
  }
  auto [set, tokens, digest] = read(path);
  AdapterInfo loaded = info(name, set, digest);
  const std::lock_guard lock(mutex_);
  const auto old = adapters_.find(name);
  if (old != adapters_.end() && (!old->second.file || !replace)) {
    throw AdapterError("an adapter named '" + name + "' is " +
                       (old->second.file ? "loaded already: unload it first, or replace it" : "the bundle's own"));
  }
  const std::uint64_t number = next_number_++;
  const std::uint64_t place = old == adapters_.end() ? number : old->second.place;
  keep(adapters_[name] = {number, place, File{path, std::move(digest)}, {}, std::move(loaded), std::move(tokens)}, set);
}

AdapterInfo Adapters::info(const std::string& name, const FactorSets& set, std::optional<std::string> digest) const {
  std::vector<std::string> targets;
  for (const TargetSpec& target : bundle_.manifest.adaptation.targets) {
    const auto found = set.tensors.find(target.name + ".lora_B");
    const auto is_zero = [](float value) { return value == 0; };
    if (found != set.tensors.end() && !std::ranges::all_of(found->second, is_zero)) targets.push_back(target.name);
  }
  return {name, rank_of(set), std::move(targets), bytes_of(set), std::move(digest), 0};
}

void Adapters::unload(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (!find(name).file) {
    throw AdapterError("the adapter '" + name + "' is the bundle's own: only one from a file can be unloaded");
  }
  adapters_.erase(name);
}

std::optional<std::size_t> Adapters::Choice::start(std::span<const std::int64_t> ids) const {
  if (invocation_tokens.empty()) return 0;
  const auto last = std::ranges::find_end(ids, invocation_tokens);
  if (last.empty()) return std::nullopt;
  return static_cast<std::size_t>(last.begin() - ids.begin());
}

Adapters::Choice Adapters::choose(const Blend& blend, std::size_t texts) {
  if (blend.weights.empty()) return {{"none", [&spec = bundle_.manifest.adaptation] { return no_factors(spec); }}};
  std::vector<std::string> chosen;
  std::vector<std::uint64_t> numbers;
  std::string key = "adapters", names;
  std::vector<WeightedSet> parts;
  std::vector<std::int64_t> invocation_tokens;
  std::int64_t rank = 0;
  for (const auto& [name, weight] : blend.weights) {
    const auto [number, set, tokens] = held(name);
    if (!tokens.empty() && blend.weights.size() > 1) {
      throw AdapterError(name + " is activated by tokens of a text, so it has no sum with other adapters");
    }
    invocation_tokens = tokens;
    chosen.push_back(name);
    numbers.push_back(number);
    parts.push_back({set, weight});
    key += " " + std::to_string(number) + " " + std::to_string(std::bit_cast<std::uint32_t>(weight));
    names += (names.empty() ? "" : ", ") + name;
    if (blend.weights.size() > 1) rank += rank_of(set);
  }
  if (const std::int64_t most = max_rank(bundle_.manifest.adaptation); rank > most) {
    throw AdapterError(names.substr(0, 800) + " have rank " + std::to_string(rank) +
                       " together: this bundle takes at most " + std::to_string(most));
  }
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < chosen.size(); ++i) {  // one that has been replaced meanwhile is forgotten
    const auto found = adapters_.find(chosen[i]);
    if (found != adapters_.end() && found->second.number == numbers[i]) found->second.info.uses += texts;
  }
  return {{key, [parts] { return blend_sets(parts); }, std::move(chosen)}, std::move(invocation_tokens)};
}

Adapters::Held Adapters::held(const std::string& name) {
  std::uint64_t number = 0;
  File file;
  {
    const std::lock_guard lock(mutex_);
    Adapter& adapter = find(name);
    adapter.last_used = ++uses_;
    if (const auto set = alive(adapter)) {
      if (!adapter.set) keep(adapter, *set);
      return {adapter.number, *set, adapter.invocation_tokens};
    }
    number = adapter.number;
    file = *adapter.file;
  }
  auto [set, tokens, now] = read(file.path);
  if (now != file.digest) {
    throw AdapterError(file.path.string() + " has changed since it was loaded: unload the adapter and load it again");
  }
  const std::lock_guard lock(mutex_);
  const auto found = adapters_.find(name);
  if (found != adapters_.end() && found->second.number == number) {
    if (const auto other = alive(found->second)) set = *other;  // another thread has read it meanwhile
    keep(found->second, set);
  }
  return {number, std::move(set), std::move(tokens)};
}

StoredAdapter Adapters::read(const std::filesystem::path& path) const {
  std::error_code problem;
  StoredAdapter stored = std::filesystem::is_directory(path, problem)
                             ? read_peft(path, bundle_)
                             : read_adapter(path, bundle_.manifest.adaptation, bundle_.manifest.model.vocab_size);
  stored.set = enter_basis(stored.set, bundle_.basis);
  return stored;
}

/// The lock is held.
Adapters::Adapter& Adapters::find(const std::string& name) {
  if (const auto found = adapters_.find(name); found != adapters_.end()) return found->second;
  std::string shown;
  for (const auto& [other, adapter] : adapters_ | std::views::take(kNamesShown)) {
    shown += (shown.empty() ? "" : ", ") + other;
  }
  if (adapters_.size() > kNamesShown) shown += " and " + std::to_string(adapters_.size() - kNamesShown) + " more";
  throw AdapterError("no adapter is named '" + name.substr(0, 80) + "': loaded are " +
                     (shown.empty() ? "none" : shown));
}

/// The factors of an adapter, if they are kept or a row holds them. The lock is held.
std::optional<FactorSets> Adapters::alive(const Adapter& adapter) {
  if (adapter.set) return adapter.set;
  auto owner = adapter.owner.lock();
  if (!owner) return std::nullopt;
  FactorSets set = adapter.unowned;
  set.owner = std::move(owner);
  return set;
}

/// Keep factors in memory, and free those of other files, least recently used first, beyond max_bytes. The lock is
/// held.
void Adapters::keep(Adapter& adapter, const FactorSets& set) {
  adapter.set = adapter.unowned = set;
  adapter.owner = set.owner;
  adapter.unowned.owner.reset();
  adapter.last_used = ++uses_;
  if (!max_bytes_) return;
  std::map<std::uint64_t, Adapter*> by_age;
  std::size_t total = 0;
  for (auto& [name, each] : adapters_) {
    if (!each.file || !each.set) continue;
    by_age[each.last_used] = &each;
    total += bytes_of(*each.set);
  }
  by_age.erase(adapter.last_used);
  for (const auto& [age, oldest] : by_age) {
    if (total <= *max_bytes_) return;
    total -= bytes_of(*oldest->set);
    oldest->set.reset();
  }
}

}  // namespace chameleon
