// The rows that are being generated, and their state in the decoder.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "chameleon/engine.h"
#include "decode/prompt_lookup.h"
#include "decode/schedule.h"
#include "decode/slots.h"
#include "engine/factor_table.h"
#include "engine/prefixes.h"
#include "engine/stream.h"
#include "generation.h"

namespace chameleon {

using Clock = std::chrono::steady_clock;

/// The prompt of one or more members.
struct Prompt {
  std::span<const std::int64_t> ids;
  std::size_t start = 0;        ///< the token from which on the factors update it, see RowFactors
  std::vector<float> logits{};  ///< [vocab] after the last token, set by the prefill
  std::size_t exact = 0;        ///< how many tokens at the beginning have the keys and values of every run, see
                                ///< prefix_cache.h
  bool begun = false;           ///< whether it was looked for in the prefix cache
};

/// One continuation of one prompt, from its submit to its end.
struct Member {
  std::shared_ptr<Stream::State> stream;  ///< owns the ids of the prompt
  std::shared_ptr<Prompt> prompt;         ///< the same object for all its continuations
  Row row;
  Clock::time_point submitted;
  Clock::time_point deadline;    ///< latest time of the end
  Clock::time_point last_token;  ///< time of the last token, or of the submit
  std::size_t draft_tokens = 0;  ///< how many tokens may be drafted for a call, at most; 0 drafts none
  std::string cache_salt{};      ///< see Generate
  bool cache_generated = true;   ///< likewise
  int overtaken = 0;             ///< see schedule.h
  bool has_ended = false;        ///< and leaves the batch with the next iteration
  FactorSource source{};         ///< of its factors, set when its cohort is complete
  Tenant tenant{};               ///< whose it is
  std::size_t place = 0;         ///< counts the members of a batch in the order in which they were admitted
  std::optional<Seconds> queued{}, first_token{};  ///< see FinishedRow
  std::optional<PromptLookup> lookup{};

  [[nodiscard]] const std::string& key() const { return source.key; }
  /// The key of the factor set that reads a token of the prompt.
  [[nodiscard]] const std::string& key_at(std::size_t position) const {
    return position < prompt->start ? kNoUpdate : source.key;
  }
  [[nodiscard]] bool is_cancelled() const { return stream->is_cancelled(row.index()); }
  /// Tokens that may follow the row's last.
  [[nodiscard]] std::vector<std::int64_t> draft();
};

using Members = std::vector<std::shared_ptr<Member>>;

/// The members of rows that are submitted now; n adjacent rows share a prompt.
Members members_of(std::vector<Row> rows, const std::shared_ptr<Stream::State>& stream, const Generate& generate,
                   const Tenant& tenant = {});

/// The factors of some members, in the table's stack.
RowFactors row_factors(const FactorTable& table, std::span<const std::shared_ptr<Member>> members);

/// The rows in the decoder.
class Batch {
 public:
  virtual ~Batch() = default;

  /// Rows in the batch; rows with a finished prefill come first.
  [[nodiscard]] const Members& members() const { return members_; }
  /// Number of rows with a finished prefill.
  [[nodiscard]] virtual std::size_t ready() const = 0;
  /// Tokens in the cache.
  [[nodiscard]] virtual std::size_t cached_tokens() const = 0;
  /// How many members may be admitted now.
  [[nodiscard]] virtual std::size_t room() const = 0;

  /// Admit a member whose factor set is in the table already.
  virtual void admit(std::shared_ptr<Member> member) = 0;
  /// Remove the members that have ended.
  virtual void drop_ended() = 0;
  /// The members in the decoder's next prefill: so many, beginning with members()[ready()].
  [[nodiscard]] virtual std::size_t to_prefill() const = 0;
  /// Prefill one chunk of a prompt, or several whole prompts that are no longer together. Returns the number of their
  /// tokens. An exception of the decoder concerns those of `to_prefill` only.
  /// crowding: names of tenants whose chunks are short
  virtual std::size_t prefill(const std::set<std::string>& crowding) = 0;
  /// The members in the decoder's next step: those that are ready, without those that have logits already.
  [[nodiscard]] virtual std::size_t to_step() const = 0;
  /// Tokens that may follow in a step that is worth a draft: of a single row.
  [[nodiscard]] virtual std::vector<std::int64_t> draft() { return {}; }
  /// Compute the logits of the next token of each ready member, [ready, 1, vocab]; with a draft of the only one those
  /// after each of its tokens too, [1, 1 + draft, vocab]. They are valid until the next step. An exception of the
  /// decoder concerns the members 0..to_step() only.
  virtual Logits step(std::span<const std::int64_t> draft) = 0;
  /// Forget the tokens of a draft that the only ready member was not given.
  virtual void cut() {}

 protected:
  Members members_;
};

/// A batch whose members join and leave at any time. See Batch.
///
/// Where a step is as exact and follows every call that prefills, the last token of a prompt is left to the step, which
/// reads the head's weights for all members in any case: several percent of the time of a prompt. Elsewhere the first
/// new token follows from the last chunk.
///
/// Tenants that have prompts to read take turns, call by call.
class ContinuousBatch final : public Batch {
 public:
  /// slots, table: of `rows` rows and for one thread; the table must outlive this
  /// cache: likewise, of this batch alone; null keeps nothing
  ContinuousBatch(std::unique_ptr<Slots> slots, const FactorTable& table, Schedule schedule,
                  PrefixCache* cache = nullptr);

  [[nodiscard]] std::size_t ready() const override { return ready_; }
  [[nodiscard]] std::size_t cached_tokens() const override;
  [[nodiscard]] std::size_t room() const override { return slots_->lengths().size() - members_.size(); }
  void admit(std::shared_ptr<Member> member) override;
  void drop_ended() override;
  [[nodiscard]] std::size_t to_prefill() const override { return reading_; }
  std::size_t prefill(const std::set<std::string>& crowding) override;
  [[nodiscard]] std::size_t to_step() const override;
  [[nodiscard]] std::vector<std::int64_t> draft() override;
  Logits step(std::span<const std::int64_t> draft) override;
  void cut() override;

 private:
  void drop(std::size_t place);
  void move(std::size_t source, std::size_t target);
  [[nodiscard]] std::size_t length_to_prefill(const Member& member) const;
  [[nodiscard]] std::size_t end_of_part(const Member& member, std::size_t start) const;
  [[nodiscard]] std::optional<std::size_t> sibling(std::size_t place) const;
  [[nodiscard]] std::size_t next_to_prefill() const;
  [[nodiscard]] std::vector<std::string> unread_tenants() const;
  void bring_next();
  std::size_t prefill_once(const std::set<std::string>& crowding);
  std::size_t prefill_chunks(std::size_t start, const std::set<std::string>& crowding);

  std::unique_ptr<Slots> slots_;
  const FactorTable& table_;
  Schedule schedule_;
  std::optional<Prefixes> prefixes_;
  std::size_t left_to_step_, ready_ = 0;
  std::size_t reading_ = 0;  // members in the last call that prefilled
  std::size_t admitted_ = 0, calls_ = 0;
  std::map<std::string, std::size_t> read_at_;  // the last call of each tenant in the batch
};

/// A continuous batch if the decoder has slots, else a static one. See Batch.
/// decoder, table: must outlive it
/// cache: of a continuous batch, see there
/// stop: ends a call of the decoder that runs
std::unique_ptr<Batch> open_batch(const Decoder& decoder, const FactorTable& table, std::size_t rows,
                                  std::size_t capacity, Schedule schedule, PrefixCache* cache = nullptr,
                                  std::stop_token stop = {});

}  // namespace chameleon
