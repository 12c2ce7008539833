// How tenants share an engine: rows by weight, calls that read prompts in turns, and the limits of each.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "chameleon/engine.h"

namespace chameleon {

/// Throws InputError for limits that a tenant cannot have.
void check(const Tenant& tenant);

/// Whose row is admitted next: deficit round robin over tokens, with debts. For one thread.
///
/// A tenant's turn lasts while its deficit is positive. Rows cost the tokens of their prompts when they are admitted,
/// and their new tokens as they come. What a tenant uses while no other waits costs nothing, and one that has left
/// comes back without credit or debt.
class Shares {
 public:
  /// Take up tenants that have come to the engine, and forget those that have left.
  void keep(const std::vector<std::string>& names);
  /// The place of the one whose turn it is, of some of the tenants that wait; at least one. Rounds are for all that
  /// wait.
  std::size_t turn(std::span<const Tenant* const> tenants, std::span<const Tenant* const> waiting);
  /// Count tokens of a tenant while the tenants of some names wait.
  void charge(const Tenant& tenant, std::size_t tokens, const std::set<std::string>& waiting);

 private:
  using Deficit = std::pair<std::string, std::int64_t>;
  [[nodiscard]] std::vector<Deficit>::iterator find(const std::string& name);

  std::vector<Deficit> deficits_;  // of the tenants in the engine, beginning with the one whose turn it is
};

/// Whether a tenant that is within its limit of rows may have another row in the batch now. The last place is kept for
/// a tenant that has none, so that nobody with a name takes all. running: rows of it in the batch free: places of the
/// batch that are free, of all `places`
bool may_begin(const Tenant& tenant, std::size_t running, std::size_t free, std::size_t places);

/// Who reads short chunks: tenants with more rows for their weight than one that waits for its prompt to be read.
///
/// Chunks stay short for some calls after that, since a tenant that asks one thing after another comes back while a
/// chunk is read. For one thread.
class Crowding {
 public:
  /// The names of the tenants whose chunk is short in the next call that reads prompts.
  /// present: the tenant of each row that waits or is in the batch
  /// unread: the tenants of rows whose prompts are not read
  std::set<std::string> names(std::span<const Tenant* const> present, std::span<const Tenant* const> unread);

 private:
  struct Waited {
    std::int64_t weight;
    std::size_t calls;  // that are left, in which chunks are short
  };

  std::map<std::string, Waited> waited_;  // by name of the tenant
};

/// Holds every tenant to its limits. The caller holds a lock.
///
/// A tenant may begin while it has a token left, since nobody knows how many a request will take: what it uses beyond,
/// it has to wait for. Tokens come back evenly, those of a minute at most.
class Accounts {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// rows, max_waiting: of the engine
  Accounts(std::size_t rows, std::size_t max_waiting, std::function<Time()> clock = std::chrono::steady_clock::now);

  /// Take the rows of a submit. Throws QueueFullError or RateLimitError.
  void begin(const Tenant& tenant, std::size_t rows, std::size_t prompt_tokens);
  /// Give back the place of a row that has ended, and count its new tokens.
  void end(const FinishedRow& row);
  /// How many tenants are known.
  [[nodiscard]] std::size_t size() const { return accounts_.size(); }

 private:
  struct Account {
    std::size_t rows = 0;  // that have not ended
    std::size_t limit = 0;
    double tokens = 0;  // left at the time `at`; less than 0 where it has used more
    Time at{};
    [[nodiscard]] double tokens_at(Time now) const;
  };

  void check_rows(const Tenant& tenant, std::size_t rows) const;

  std::size_t rows_, max_waiting_;
  std::function<Time()> clock_;
  std::map<std::string, Account> accounts_;
};

}  // namespace chameleon
