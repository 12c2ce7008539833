// Rows that join, read, step, move, fork and leave: each as if it were alone.

#include "decode/slots.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "decode/schedule.h"
#include "decode/shared_cache.h"
#include "engine/factor_table.h"
#include "runtime_impl.h"
#include "shared_data.h"

namespace chameleon::test::slots_test {

namespace {

constexpr std::size_t kRows = 4, kCapacity = 24;
constexpr float kTolerance = 2e-5F;  // sums in another order

const Runtime& runtime() {
  static const Runtime runtime(good_bundle("chameleon_masked"), {.threads = 1});
  return runtime;
}

const SharedCacheDecoder& decoder() {
  return dynamic_cast<const SharedCacheDecoder&>(*runtime().impl().backend.decoder);
}

struct Rows {
  Rows() {
    const Embedded clusters{{}, {0, 1, 2}};
    for (const FactorSource& source :
         runtime().impl().sources.of_rows({.mode = Mode::centroid}, {}, clusters).sources) {
      table.acquire(source);
      keys.push_back(source.key);
    }
  }

  /// The logits after a row's tokens, read whole by the decoder.
  [[nodiscard]] std::vector<float> alone(std::size_t row) const {
    const std::span<const std::int64_t> ids(tokens[row]);
    std::vector<float> last;
    const auto take = [&](std::size_t, Logits logits) {
      const auto values = logits.at(0, logits.positions() - 1);
      last.assign(values.begin(), values.end());
    };
    decoder().all_logits(chameleon::Rows(&ids, 1), table.set_of(keys[sets[row]]), take, {});
    return last;
  }

  /// Append tokens to one row. Returns the logits after them.
  std::vector<float> prefill(std::size_t row, std::span<const std::int64_t> ids, const RowFactors& factors) {
    return slots->prefill(row, chameleon::Rows(&ids, 1), factors, true);
  }

  std::unique_ptr<Slots> slots = decoder().slots(kRows, kCapacity);
  FactorTable table{3};
  std::vector<std::string> keys;
  std::vector<TokenIds> tokens;   // of each row in use
  std::vector<std::size_t> sets;  // likewise
};

/// The largest difference of two logits, as a share of the largest logit.
float largest_difference(std::span<const float> found, std::span<const float> expected) {
  float difference = 0, logit = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference = std::max(difference, std::abs(found[i] - expected[i]));
    logit = std::max(logit, std::abs(expected[i]));
  }
  return difference / logit;
}

void run_sequence(unsigned int seed) {
  std::mt19937 random(seed);
  Rows rows;
  const auto token = [&] { return static_cast<std::int64_t>(random() % 320); };
  for (int operation = 0; operation < 24; ++operation) {
    const std::size_t used = rows.tokens.size(), row = used > 0 ? random() % used : 0;
    switch (random() % 7) {
      case 0: {  // admit, with a prompt
        if (used == kRows) break;
        rows.slots->admit(used);
        TokenIds& ids = rows.tokens.emplace_back();
        rows.sets.push_back(random() % 3);
        for (std::size_t i = 1 + random() % 12; i > 0; --i) ids.push_back(token());
        const RowFactors factors = rows.table.set_of(rows.keys[rows.sets.back()]);
        const std::size_t half = ids.size() / 2;
        if (half > 0) rows.prefill(used, std::span(ids).first(half), factors);
        ASSERT_LT(largest_difference(rows.prefill(used, std::span(ids).subspan(half), factors), rows.alone(used)),
                  kTolerance);
        break;
      }
      case 1: {  // admit several, whose prompts are read in one call
        RowFactors factors{rows.table.sets(), {}};
        for (std::size_t place = used; place < kRows; ++place) {
          rows.slots->admit(place);
          rows.sets.push_back(random() % 3);
          factors.factor_ids.push_back(static_cast<std::int64_t>(rows.table.index(rows.keys[rows.sets.back()])));
          TokenIds& ids = rows.tokens.emplace_back();
          for (std::size_t i = 1 + random() % 12; i > 0; --i) ids.push_back(token());
        }
        if (used == kRows) break;
        const std::vector<std::span<const std::int64_t>> prompts(
            rows.tokens.begin() + static_cast<std::ptrdiff_t>(used), rows.tokens.end());
        const std::vector<float> logits = rows.slots->prefill(used, prompts, factors, true);
        const std::size_t vocab = logits.size() / prompts.size();
        for (std::size_t i = 0; i < prompts.size(); ++i) {
          const auto own = std::span(logits).subspan(i * vocab, vocab);
          ASSERT_LT(largest_difference(own, rows.alone(used + i)), kTolerance);
        }
        break;
      }
      case 2:
      case 3: {  // step
        if (used == 0) break;
        if (std::ranges::any_of(rows.tokens, [](const TokenIds& ids) { return ids.size() >= kCapacity; })) break;
        TokenIds next;
        RowFactors factors{rows.table.sets(), {}};
        for (std::size_t i = 0; i < used; ++i) {
          next.push_back(token());
          rows.tokens[i].push_back(next.back());
          factors.factor_ids.push_back(static_cast<std::int64_t>(rows.table.index(rows.keys[rows.sets[i]])));
        }
        rows.slots->step(next, factors);
        for (std::size_t i = 0; i < used; ++i)
          ASSERT_LT(largest_difference(rows.slots->logits().at(i), rows.alone(i)), kTolerance);
        break;
      }
      case 4: {  // fork
        if (used == 0 || used == kRows) break;
        const std::size_t length = 1 + random() % rows.tokens[row].size();
        rows.slots->fork(row, used, static_cast<std::int64_t>(length));
        rows.tokens.emplace_back(rows.tokens[row].begin(),
                                 rows.tokens[row].begin() + static_cast<std::ptrdiff_t>(length));
        rows.sets.push_back(rows.sets[row]);
        break;
      }
      case 5: {  // draft, of which some tokens are cut off again
        if (used == 0) break;
        TokenIds& ids = rows.tokens[row];
        const std::size_t count = 1 + random() % 5, past = ids.size();
        if (past + count > kCapacity) break;
        for (std::size_t i = 0; i < count; ++i) ids.push_back(token());
        const auto drafted = std::span<const std::int64_t>(ids).subspan(past);
        Logits logits = rows.slots->draft(row, drafted, rows.table.set_of(rows.keys[rows.sets[row]]));
        for (std::size_t kept = count; kept > 0; --kept) {
          ids.resize(past + kept);
          ASSERT_LT(largest_difference(logits.at(0, kept - 1), rows.alone(row)), kTolerance);
          if (random() % 2 == 0) break;
        }
        rows.slots->cut(row, std::ssize(ids));
        break;
      }
      default:  // drop
        if (used == 0) break;
        if (row + 1 < used) rows.slots->move(used - 1, row);
        rows.tokens[row] = rows.tokens.back();
        rows.sets[row] = rows.sets.back();
        rows.tokens.pop_back();
        rows.sets.pop_back();
    }
    for (std::size_t i = 0; i < rows.tokens.size(); ++i) {
      ASSERT_EQ(rows.slots->lengths()[i], std::ssize(rows.tokens[i]));
    }
  }
}

}  // namespace

TEST(Slots, EveryRowIsAsIfAlone) {
  for (unsigned int seed = 0; seed < 60; ++seed) {
    run_sequence(seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

TEST(Slots, AFaultWouldBeSeen) {
  Rows rows;
  rows.tokens = {{5, 6, 7, 8}, {5, 6, 7, 8}};
  rows.sets = {0, 1};
  const auto factors = [&](std::size_t set) { return rows.table.set_of(rows.keys[set]); };
  rows.slots->admit(0);
  rows.prefill(0, std::span(rows.tokens[0]).first(3), factors(0));
  rows.slots->fork(0, 1, 2);  // a token less
  const auto whole = rows.prefill(0, std::span(rows.tokens[0]).subspan(3), factors(0));
  const auto shorter = rows.prefill(1, std::span(rows.tokens[0]).subspan(3), factors(0));
  EXPECT_LT(largest_difference(whole, rows.alone(0)), kTolerance);
  EXPECT_GT(largest_difference(shorter, rows.alone(0)), 100 * kTolerance);
  EXPECT_GT(largest_difference(whole, rows.alone(1)), 100 * kTolerance);  // another set of factors
}

TEST(Slots, MoreMemoryThanThereIsIsAnError) {
  EXPECT_THROW((void)decoder().slots(std::size_t{1} << 50, 48), LengthError);
  EXPECT_THROW((void)decoder().slots(SIZE_MAX, 48), LengthError);
}

TEST(Slots, AChunkNeverLeavesASingleToken) {
  for (std::size_t length = 2; length < 100; ++length) {
    std::size_t left = length;
    while (left > 0) {
      const std::size_t chunk = chunk_length(left, 8);
      ASSERT_TRUE(chunk > 1 && chunk <= 8) << length;
      left -= chunk;
    }
  }
}

}  // namespace chameleon::test::slots_test
