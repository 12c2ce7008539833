// Named adapters: factor sets that callers choose by name, row by row.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "chameleon/adaptation.h"
#include "chameleon/bundle.h"
#include "chameleon/runtime.h"
#include "contract/adapter_file.h"
#include "factors.h"

namespace chameleon {

/// The adapters of a bundle, and those that were loaded from files and PEFT directories. For any number of threads.
class Adapters {
 public:
  /// bundle: must outlive this
  /// max_bytes: of the factors of those that stay in memory; those used least recently leave first
  Adapters(const Bundle& bundle, std::optional<std::size_t> max_bytes);

  /// In the order in which they were loaded; one that is replaced keeps its place.
  [[nodiscard]] std::vector<AdapterInfo> list() const;

  /// Read an adapter, see Runtime::load_adapter.
  void load(const std::string& name, const std::filesystem::path& path, bool replace);
  /// Remove an adapter of a file. Throws AdapterError for a name that no adapter has, or one of the bundle.
  void unload(const std::string& name);

  /// What a row has chosen. It holds the adapters' factors, whatever is unloaded or leaves the memory.
  struct Choice {
    FactorSource source;
    std::vector<std::int64_t> invocation_tokens{};  ///< of an activated adapter, else none

    /// The token from which on it updates a text and what follows; nothing if it updates none.
    [[nodiscard]] std::optional<std::size_t> start(std::span<const std::int64_t> ids) const;
  };
  /// texts: that choose it, which are counted
  /// Throws AdapterError for a name that no adapter has, a file that has changed, an activated adapter beside others,
  /// or ranks that are too large together.
  [[nodiscard]] Choice choose(const Blend& blend, std::size_t texts);

 private:
  /// Where factors are read again when they have left the memory, and the SHA-256 of what was loaded.
  struct File {
    std::filesystem::path path;
    std::string digest;
  };
  struct Adapter {
    std::uint64_t number;           // another for an adapter that is loaded later under the same name
    std::uint64_t place;            // in the list
    std::optional<File> file;       // none for an adapter of the bundle, whose factors stay
    std::optional<FactorSets> set;  // while it is kept in memory
    AdapterInfo info;
    std::vector<std::int64_t> invocation_tokens{};
    std::uint64_t last_used = 0;
    FactorSets unowned{};               // the set, without what keeps it alive:
    std::weak_ptr<const void> owner{};  // rows may, when it is no longer kept
  };

  /// An adapter as a row holds it.
  struct Held {
    std::uint64_t number;
    FactorSets set;
    std::vector<std::int64_t> invocation_tokens;
  };

  [[nodiscard]] Held held(const std::string& name);
  [[nodiscard]] AdapterInfo info(const std::string& name, const FactorSets& set,
                                 std::optional<std::string> digest) const;
  [[nodiscard]] StoredAdapter read(const std::filesystem::path& path) const;
  [[nodiscard]] Adapter& find(const std::string& name);
  [[nodiscard]] static std::optional<FactorSets> alive(const Adapter& adapter);
  void keep(Adapter& adapter, const FactorSets& set);

  const Bundle& bundle_;
  const std::optional<std::size_t> max_bytes_;
  mutable std::mutex mutex_;  // guards what follows
  std::map<std::string, Adapter> adapters_;
  std::uint64_t next_number_ = 0, uses_ = 0;
};

}  // namespace chameleon
