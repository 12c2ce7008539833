// Reads tests/data, which tests/make_data.py writes; the Python counterpart is tests/shared_data.py.
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "chameleon/runtime.h"

namespace chameleon::test {

using Json = nlohmann::json;

std::filesystem::path data_directory();
Json read_data(const std::string& name);
std::filesystem::path good_bundle(const std::string& name);
std::string from_base64(std::string_view text);

/// A copy of the good bundle of a case with the case's changes, in a directory that is removed with this object.
class HostileBundle {
 public:
  explicit HostileBundle(const Json& hostile_case);
  ~HostileBundle();
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A caller's factors of lm_head that every language computes alike: value i is ((7 i + 3) mod 11 - 5) / 16.
struct CallerFactors {
  CallerFactors(std::int64_t rank, const ModelSpec& model);
  /// Valid as long as this.
  [[nodiscard]] Factors factors() const;
  std::size_t rank, hidden_size;
  std::vector<float> values;
};

/// A caller's vectors, written down as lists of numbers.
struct CallerVectors {
  explicit CallerVectors(const Json& rows);
  /// Valid as long as this.
  [[nodiscard]] Matrix matrix() const { return {rows, values.size() / rows, values}; }
  std::size_t rows;
  std::vector<float> values;
};

/// The prompts of a golden case, of a submit of a schedule or of another call, and how they are adapted and continued.
/// A field that the record does not name, or whose value is null, is the default.
struct Call {
  Call(const Json& record, const ModelSpec& model);
  std::vector<TokenIds> prompts;
  Adapt adapt;
  Generate generate;

 private:
  std::shared_ptr<CallerFactors> factors_;  // where `adapt` points to
  std::shared_ptr<CallerVectors> vectors_;  // likewise
};

/// A caller's factor set for lm_head.
Factors head_factors(std::size_t rank, std::span<const float> lora_A, std::span<const float> lora_B);

/// lm_head.lora_B of all factor sets of a batch.
std::span<const float> lora_B_of(const Adaptation& adaptation);

/// Settings that the record does not name are the default.
Sampling read_sampling(const Json& json);

/// The logits of a case of sampling.json, which are written down or have a formula.
std::vector<float> read_logits(const Json& json);

}  // namespace chameleon::test
