#include "encoder.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "adaptation.h"
#include "inputs.h"
#include "tokenizer/utf8.h"

namespace chameleon {

namespace {

constexpr std::size_t kMaxRemembered = 256;  // descriptions: requests repeat theirs

ModelSpec limits_of(const Bundle& bundle) {
  const EncoderSpec& spec = bundle.manifest.encoder.value();
  ModelSpec limits = bundle.manifest.model;
  limits.vocab_size = spec.vocab_size;
  limits.max_positions = spec.max_tokens - std::ssize(spec.prefix_ids) - std::ssize(spec.suffix_ids);
  return limits;
}

/// As Python's str.strip, which takes the separators U+001C to U+001F for spaces too.
std::string_view stripped(std::string_view text) {
  const auto is_separator = [](char c) { return c >= 0x1C && c <= 0x1F; };
  for (std::size_t before = text.size() + 1; text.size() < before;) {
    before = text.size();
    text.remove_prefix(spaces_at_start(text));
    text.remove_suffix(spaces_at_end(text));
    if (!text.empty() && is_separator(text.front())) text.remove_prefix(1);
    if (!text.empty() && is_separator(text.back())) text.remove_suffix(1);
  }
  return text;
}

bool is_letter(char32_t c) {
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

/// A description that ends as those did which the network was trained on: a letter gets a full stop.
std::string with_stop(const std::string& description) {
  if (find_invalid_utf8(description)) return description;  // the tokenizer says where
  std::string text(stripped(description));
  if (text.empty()) return text;
  std::size_t last = last_code_point(text);
  return is_letter(next_code_point(text, last)) ? text + '.' : text;
}

}  // namespace

Encoder::Encoder(const Ort::Env& env, const Bundle& bundle, const LoadOptions& options)
    : spec_(bundle.manifest.encoder.value()),
      limits_(limits_of(bundle)),
      session_(open_session(env, bundle, bundle.graph("encoder", "cpu"), options)),
      tokenizer_(load_tokenizer(bundle.path / kEncoderTokenizer)) {}

std::vector<TokenIds> Encoder::encode(std::span<const std::string> texts) const {
  return chameleon::encode(texts, tokenizer_, limits_);
}

std::vector<float> Encoder::embed(const TokenIds& row) const {
  TokenIds ids = spec_.prefix_ids;
  ids.insert(ids.end(), row.begin(), row.end());
  ids.insert(ids.end(), spec_.suffix_ids.begin(), spec_.suffix_ids.end());
  constexpr std::array input_names{"input_ids"}, output_names{"embeddings"};
  const std::array inputs{tensor_over(std::span<const std::int64_t>(ids), {1, std::ssize(ids)})};
  std::array<Ort::Value, 1> outputs{Ort::Value(nullptr)};
  run_session(session_, {}, input_names, inputs, output_names, outputs);
  const auto* values = outputs[0].GetTensorData<float>();
  return {values, values + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount()};
}

std::vector<float> Encoder::conditioning(std::span<const std::string> descriptions) const {
  std::vector<std::string> texts;
  for (const std::string& text : descriptions) texts.push_back(spec_.full_stop ? with_stop(text) : text);
  std::vector<float> vectors;
  for (const TokenIds& row : encode(texts)) {
    const std::vector<float> own = remembered(row);
    vectors.insert(vectors.end(), own.begin(), own.end());
  }
  return vectors;
}

/// The vector of a description, from memory where it is there. Two threads may both compute it; they get the same.
std::vector<float> Encoder::remembered(const TokenIds& row) const {
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = places_.find(row); found != places_.end()) {
      vectors_.splice(vectors_.begin(), vectors_, found->second);
      return found->second->second;
    }
  }
  std::vector<float> made = vector(row);
  const std::lock_guard lock(mutex_);
  if (places_.contains(row)) return made;
  vectors_.emplace_front(row, made);
  places_.emplace(row, vectors_.begin());
  if (vectors_.size() > kMaxRemembered) {
    places_.erase(vectors_.back().first);
    vectors_.pop_back();
  }
  return made;
}

std::vector<float> Encoder::vector(const TokenIds& row) const {
  std::vector<float> embedding = embed(row);
  if (spec_.conditioning_norm == 0) return embedding;
  std::vector<double> squares(embedding.begin(), embedding.end());
  for (double& value : squares) value *= value;
  const double length = std::max(std::sqrt(pairwise_sum(squares)), 1e-12);
  for (float& value : embedding) value = static_cast<float>(value / length * spec_.conditioning_norm);
  return embedding;
}

}  // namespace chameleon
