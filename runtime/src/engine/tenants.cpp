#include "engine/tenants.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "chameleon/error.h"

namespace chameleon {

namespace {

constexpr std::int64_t kQuantum = 16;    // tokens that a weight of 1 is worth in a round
constexpr std::size_t kShortCalls = 32;  // that read prompts after a tenant has waited for its own
constexpr std::int64_t kMaxWeight = 1000;
constexpr std::size_t kMaxLimit = std::size_t{1} << 40;

}  // namespace

void check(const Tenant& tenant) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw InputError(what);
  };
  require(tenant.weight >= 1 && tenant.weight <= kMaxWeight, "the weight of a tenant must be from 1 to 1000");
  const auto is_limit = [](const std::optional<std::size_t>& limit, std::size_t least) {
    return !limit || (*limit >= least && *limit <= kMaxLimit);
  };
  require(is_limit(tenant.rows, 1), "the rows of a tenant must be at least 1");
  require(is_limit(tenant.max_waiting, 0), "max_waiting of a tenant is too large");
  require(is_limit(tenant.tokens_per_minute, 1), "tokens_per_minute of a tenant must be at least 1");
}

std::vector<Shares::Deficit>::iterator Shares::find(const std::string& name) {
  return std::ranges::find(deficits_, name, &Deficit::first);
}

void Shares::keep(const std::vector<std::string>& names) {
  std::erase_if(deficits_, [&](const Deficit& each) { return std::ranges::find(names, each.first) == names.end(); });
  for (const std::string& name : names) {
    if (find(name) == deficits_.end()) deficits_.emplace_back(name, 0);
  }
}

std::size_t Shares::turn(std::span<const Tenant* const> tenants, std::span<const Tenant* const> waiting) {
  std::int64_t rounds = std::numeric_limits<std::int64_t>::max();
  for (const Tenant* tenant : tenants) {
    const std::int64_t deficit = find(tenant->name)->second;
    rounds = std::min(rounds, deficit > 0 ? 0 : -deficit / (kQuantum * tenant->weight) + 1);
  }
  for (const Tenant* tenant : waiting) find(tenant->name)->second += rounds * kQuantum * tenant->weight;
  std::size_t found = 0;
  const auto first = std::ranges::find_if(deficits_, [&](const Deficit& each) {
    const auto own = std::ranges::find(tenants, each.first, [](const Tenant* tenant) { return tenant->name; });
    found = static_cast<std::size_t>(own - tenants.begin());
    return own != tenants.end() && each.second > 0;
  });
  std::ranges::rotate(deficits_, first);
  return found;
}

void Shares::charge(const Tenant& tenant, std::size_t tokens, const std::set<std::string>& waiting) {
  const auto own = find(tenant.name);
  const std::size_t others = waiting.size() - waiting.count(tenant.name);
  if (own != deficits_.end() && others > 0) own->second -= static_cast<std::int64_t>(tokens);
}

bool may_begin(const Tenant& tenant, std::size_t running, std::size_t free, std::size_t places) {
  return free > 1 || places == 1 || tenant.name.empty() || running == 0;
}

std::set<std::string> Crowding::names(std::span<const Tenant* const> present, std::span<const Tenant* const> unread) {
  std::erase_if(waited_, [](auto& each) { return --each.second.calls == 0; });
  for (const Tenant* tenant : unread) waited_[tenant->name] = {.weight = tenant->weight, .calls = kShortCalls};
  if (waited_.size() == 1) return {};
  std::map<std::string, double> rows;
  for (const Tenant* tenant : present) ++rows[tenant->name];
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [name, waited] : waited_) {
    const auto found = rows.find(name);  // who is away will have a row
    least = std::min(least, (found == rows.end() ? 1 : found->second) / static_cast<double>(waited.weight));
  }
  std::set<std::string> names;
  for (const Tenant* tenant : present) {
    if (rows[tenant->name] / static_cast<double>(tenant->weight) > least) names.insert(tenant->name);
  }
  return names;
}

Accounts::Accounts(std::size_t rows, std::size_t max_waiting, std::function<Time()> clock)
    : rows_(rows), max_waiting_(max_waiting), clock_(std::move(clock)) {}

double Accounts::Account::tokens_at(Time now) const {
  const auto most = static_cast<double>(limit);
  return std::min(most, tokens + std::chrono::duration<double>(now - at).count() * most / 60);
}

void Accounts::begin(const Tenant& tenant, std::size_t rows, std::size_t prompt_tokens) {
  const Time now = clock_();
  std::erase_if(accounts_, [&](const auto& known) {  // those that are as if they had never come
    const Account& account = known.second;
    return account.rows == 0 && account.tokens_at(now) >= static_cast<double>(account.limit);
  });
  check_rows(tenant, rows);
  const auto found = accounts_.find(tenant.name);
  const std::size_t limit = tenant.tokens_per_minute.value_or(0);
  Account account = found != accounts_.end() ? found->second : Account{0, limit, static_cast<double>(limit), now};
  account.tokens = account.tokens_at(now);
  account.limit = limit;
  account.at = now;
  if (limit > 0) {
    if (account.tokens < 1) {
      const double seconds = std::ceil((1 - account.tokens) * 60 / static_cast<double>(limit));
      throw RateLimitError("tenant '" + tenant.name + "' has used its " + std::to_string(limit) +
                           " tokens per minute: try again in " + std::to_string(std::llround(seconds)) + " s");
    }
    account.tokens -= static_cast<double>(prompt_tokens);
  }
  account.rows += rows;
  accounts_[tenant.name] = account;
}

void Accounts::end(const FinishedRow& row) {
  Account& account = accounts_.at(row.tenant);
  --account.rows;
  if (account.limit > 0) account.tokens -= static_cast<double>(row.new_tokens);
}

void Accounts::check_rows(const Tenant& tenant, std::size_t rows) const {
  std::size_t own = rows, others = 0;
  for (const auto& [name, account] : accounts_) (name == tenant.name ? own : others) += account.rows;
  if (tenant.max_waiting && own > std::min(tenant.rows.value_or(rows_), rows_) + *tenant.max_waiting) {
    throw QueueFullError("no room for " + std::to_string(rows) + " rows of tenant '" + tenant.name +
                         "': try again later");
  }
  if (!tenant.name.empty() && own > std::max<std::size_t>((rows_ + max_waiting_ - others) / 2, 1)) {
    throw QueueFullError("tenant '" + tenant.name + "' has half of the queue that others leave: try again later");
  }
}

}  // namespace chameleon
