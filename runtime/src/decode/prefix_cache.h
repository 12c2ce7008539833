// Keys and values that later prompts may begin with, in memory outside the slots.
//
// They depend on the bundle, on the values of the factors that reach the trunk, on the tokens from the first, on which
// of them the factors update, and on nothing else. So that is what finds them, beside a salt; names of adapters are no
// part of it. Tokens are compared themselves, block by block, so that no collision of digests can confuse two texts.
//
// A block is exact if it was read as part of a whole chunk that began at a multiple of the chunk's length, after exact
// ones: the same call with the same inputs as in a run that finds nothing, so the same bits. What steps, drafts and
// other chunks wrote differs from that in the order of sums, and in int8 in rounding.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "chameleon/engine.h"
#include "decode/bound_call.h"

namespace chameleon {

/// Blocks of keys and values, found by what they depend on; the least recently used leave first.
///
/// One thread, the engine's, calls `find` and `offer`; what it found holds its values until it offers others. Any
/// thread may call `stats` and `clear`.
class PrefixCache {
  struct Block;
  using Children = std::unordered_map<std::string, std::unique_ptr<Block>>;  // by their tokens

 public:
  static constexpr std::size_t kBlockTokens = 16;

  /// The beginning of all texts that may share keys and values.
  class Root {
   public:
    Root(std::string of, std::string with) : digest(std::move(of)), salt(std::move(with)) {}
    const std::string digest, salt;

   private:
    friend PrefixCache;
    std::size_t blocks = 0;  // after it, however far
    Children children;
  };

  /// Keys and values of kBlockTokens tokens, [buffers, heads, tokens, head_dim].
  struct Found {
    const std::byte* memory;
    bool is_exact;
  };

  /// graph: whose keys and values these are
  /// bundle_digest: SHA-256
  /// Throws InputError if there is not enough address space.
  PrefixCache(const SharedCacheGraph& graph, std::string bundle_digest, std::size_t max_bytes);

  /// The root of texts that are read with factors whose values have this digest.
  /// start, before: of an update that begins later: the first token that it updates, and the tokens before the root
  [[nodiscard]] std::shared_ptr<Root> root(const std::string& factors_digest, const std::string& salt,
                                           std::size_t start = 0, std::span<const std::int64_t> before = {});
  /// The blocks that a text begins with.
  /// is_used: whether they are as recently used as can be now
  std::vector<Found> find(const Root& root, std::span<const std::int64_t> ids, bool is_used);
  /// Count tokens of a prompt, and those that were found.
  void count(std::size_t queries, std::size_t hits);
  /// Keep the whole blocks of a text, as far as there is room, and those of them that are exact instead of others.
  /// exact: how many tokens at the beginning are exact
  /// copy_out: copies the keys and values from a token on into a block's memory
  void offer(const std::shared_ptr<Root>& root, std::span<const std::int64_t> ids, std::size_t exact,
             const std::function<void(std::size_t start, std::byte* block)>& copy_out);

  /// The state, with the tokens and bytes of salts that begin with `salt`.
  [[nodiscard]] PrefixCacheStats stats(const std::string& salt) const;
  /// Forget the blocks of salts that begin with `salt`.
  void clear(const std::string& salt);

 private:
  struct Block {
    Root* root;
    Children* siblings;  // itself among them
    std::string tokens;
    std::size_t place;
    bool is_exact;
    Children children{};
    std::list<Block*>::iterator age{};
  };

  [[nodiscard]] std::byte* memory_of(std::size_t place) const { return memory_.get() + place * block_bytes_; }
  [[nodiscard]] std::vector<Block*> walk(const Root& root, std::span<const std::int64_t> ids) const;
  void use(std::span<Block* const> blocks);
  void make_room(std::size_t wanted, std::span<Block* const> used);
  [[nodiscard]] std::size_t room() const { return max_blocks_ - used_ + free_.size(); }
  std::size_t take_place();
  void remove(Block* block);

  std::string bundle_digest_;
  std::size_t block_bytes_, max_blocks_;
  std::unique_ptr<std::byte[]> memory_;                           // becomes resident only where it is written
  mutable std::mutex mutex_;                                      // guards what follows
  std::unordered_map<std::string, std::shared_ptr<Root>> roots_;  // by digest
  // Least recently used first. Whoever uses a block uses those before it too, later: so a block comes before its parent
  // here, and the first has no children.
  std::list<Block*> by_age_;
  std::vector<std::size_t> free_;  // places that blocks have left
  std::size_t used_ = 0;           // places that ever held a block
  std::size_t queries_ = 0, hits_ = 0, evictions_ = 0;
};

}  // namespace chameleon
