#include "decode/prefix_cache.h"

#include <algorithm>
#include <new>

#include "chameleon/error.h"
#include "contract/mapped_file.h"

namespace chameleon {

namespace {

std::string key_of(std::span<const std::int64_t> ids) {
  return {reinterpret_cast<const char*>(ids.data()), ids.size_bytes()};
}

std::string digest_of(const std::string& text) { return sha256(std::as_bytes(std::span(text))); }

}  // namespace

PrefixCache::PrefixCache(const SharedCacheGraph& graph, std::string bundle_digest, std::size_t max_bytes) try
    : bundle_digest_(std::move(bundle_digest)),
      block_bytes_(graph.cache_bytes(1, kBlockTokens)),
      max_blocks_(max_bytes / block_bytes_),
      memory_(std::make_unique_for_overwrite<std::byte[]>(max_blocks_ * block_bytes_)) {
} catch (const std::bad_alloc&) {
  throw InputError("no memory for a prefix cache of " + std::to_string(max_bytes) + " bytes: pass fewer");
}

std::shared_ptr<PrefixCache::Root> PrefixCache::root(const std::string& factors_digest, const std::string& salt,
                                                     std::size_t start, std::span<const std::int64_t> before) {
  std::string parts = "bundle" + bundle_digest_ + "factors" + factors_digest + "salt" + digest_of(salt);
  if (start > 0) parts += "start" + std::to_string(start) + "before" + digest_of(key_of(before));
  std::string digest = digest_of(parts);
  const std::lock_guard lock(mutex_);
  const auto known = roots_.find(digest);
  return known != roots_.end() ? known->second : std::make_shared<Root>(std::move(digest), salt);
}

std::vector<PrefixCache::Found> PrefixCache::find(const Root& root, std::span<const std::int64_t> ids, bool is_used) {
  const std::lock_guard lock(mutex_);
  const std::vector<Block*> blocks = walk(root, ids);
  if (is_used) use(blocks);
  std::vector<Found> found;
  for (const Block* block : blocks) found.push_back({memory_of(block->place), block->is_exact});
  return found;
}

void PrefixCache::count(std::size_t queries, std::size_t hits) {
  const std::lock_guard lock(mutex_);
  queries_ += queries;
  hits_ += hits;
}

void PrefixCache::offer(const std::shared_ptr<Root>& root, std::span<const std::int64_t> ids, std::size_t exact,
                        const std::function<void(std::size_t start, std::byte* block)>& copy_out) {
  const std::size_t wanted = ids.size() / kBlockTokens, exact_blocks = exact / kBlockTokens;
  const std::lock_guard lock(mutex_);
  std::vector<Block*> blocks = walk(*root, ids);
  for (std::size_t i = 0; i < std::min(exact_blocks, blocks.size()); ++i) {
    if (blocks[i]->is_exact) continue;
    copy_out(i * kBlockTokens, memory_of(blocks[i]->place));
    blocks[i]->is_exact = true;
  }
  use(blocks);
  if (blocks.size() == wanted) return;
  make_room(wanted - blocks.size(), blocks);
  while (blocks.size() < wanted && room() > 0) {
    const std::size_t i = blocks.size();
    if (blocks.empty()) roots_.try_emplace(root->digest, root);
    Children& siblings = blocks.empty() ? root->children : blocks.back()->children;
    std::string tokens = key_of(ids.subspan(i * kBlockTokens, kBlockTokens));
    auto block = std::make_unique<Block>(Block{root.get(), &siblings, tokens, take_place(), i < exact_blocks});
    block->age = by_age_.insert(by_age_.end(), block.get());
    copy_out(i * kBlockTokens, memory_of(block->place));
    ++root->blocks;
    blocks.push_back(block.get());
    siblings.emplace(std::move(tokens), std::move(block));
  }
  use(blocks);
}

PrefixCacheStats PrefixCache::stats(const std::string& salt) const {
  const std::lock_guard lock(mutex_);
  std::size_t blocks = 0;
  for (const auto& [digest, root] : roots_) {
    if (root->salt.starts_with(salt)) blocks += root->blocks;
  }
  return {blocks * kBlockTokens, blocks * block_bytes_, max_blocks_ * block_bytes_, queries_, hits_, evictions_};
}

void PrefixCache::clear(const std::string& salt) {
  const std::lock_guard lock(mutex_);
  for (auto next = by_age_.begin(); next != by_age_.end();) {
    Block* block = *next++;
    if (block->root->salt.starts_with(salt)) remove(block);
  }
}

std::vector<PrefixCache::Block*> PrefixCache::walk(const Root& root, std::span<const std::int64_t> ids) const {
  std::vector<Block*> blocks;
  const Children* children = &root.children;
  for (std::size_t start = 0; start + kBlockTokens <= ids.size(); start += kBlockTokens) {
    const auto known = children->find(key_of(ids.subspan(start, kBlockTokens)));
    if (known == children->end()) break;
    blocks.push_back(known->second.get());
    children = &known->second->children;
  }
  return blocks;
}

void PrefixCache::use(std::span<Block* const> blocks) {
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    by_age_.splice(by_age_.end(), by_age_, (*block)->age);
  }
}

/// Remove blocks for as many others, but none of the text that these continue, which was used last.
void PrefixCache::make_room(std::size_t wanted, std::span<Block* const> used) {
  const Block* last = used.empty() ? nullptr : used.back();
  while (room() < wanted && !by_age_.empty() && by_age_.front() != last) {
    remove(by_age_.front());
    evictions_ += kBlockTokens;
  }
}

std::size_t PrefixCache::take_place() {
  if (free_.empty()) return used_++;
  const std::size_t place = free_.back();
  free_.pop_back();
  return place;
}

void PrefixCache::remove(Block* block) {
  by_age_.erase(block->age);
  free_.push_back(block->place);
  const auto root = roots_.find(block->root->digest);
  const std::size_t left = --root->second->blocks;
  block->siblings->erase(std::string(block->tokens));  // which destroys it
  if (left == 0) roots_.erase(root);
}

}  // namespace chameleon
