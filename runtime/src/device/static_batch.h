// Generation on a decoder without slots, whose rows all begin at once.
#pragma once

#include "engine/batch.h"

namespace chameleon {

/// A batch that runs to its end; members join only while nothing runs. See Batch.
class StaticBatch final : public Batch {
 public:
  /// decoder, table: must outlive this
  StaticBatch(const StaticDecoder& decoder, const FactorTable& table, std::size_t rows);

  [[nodiscard]] std::size_t ready() const override { return members_.size(); }
  [[nodiscard]] std::size_t cached_tokens() const override;
  [[nodiscard]] std::size_t room() const override { return cache_ == nullptr ? rows_ - members_.size() : 0; }
  void admit(std::shared_ptr<Member> member) override { members_.push_back(std::move(member)); }
  void drop_ended() override;
  [[nodiscard]] std::size_t to_prefill() const override { return 0; }
  std::size_t prefill(const std::set<std::string>& /*crowding*/) override { return 0; }
  [[nodiscard]] std::size_t to_step() const override { return members_.size(); }
  Logits step(std::span<const std::int64_t> draft) override;

 private:
  const StaticDecoder& decoder_;
  const FactorTable& table_;
  std::size_t rows_;
  std::unique_ptr<Cache> cache_;  // of the members that run; null while none do
  RowFactors factors_;            // likewise
};

}  // namespace chameleon
