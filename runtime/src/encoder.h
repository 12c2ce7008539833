// The sentence encoder of a bundle: descriptions of tasks to conditioning vectors.
//
// Each text is a call of its own, so that its embedding depends on no other.
#pragma once

#include <list>
#include <map>
#include <mutex>

#include "decode/session.h"

namespace chameleon {

/// An opened encoder, for any number of threads.
class Encoder {
 public:
  /// bundle: must outlive this
  /// Throws ManifestError for a tokenizer that does not load, GraphError for a graph that does not.
  Encoder(const Ort::Env& env, const Bundle& bundle, const LoadOptions& options);

  /// The token ids of texts, without special tokens. Throws InputError, TokenError or LengthError: no text is cut.
  [[nodiscard]] std::vector<TokenIds> encode(std::span<const std::string> texts) const;
  /// The embedding of token ids from `encode`.
  [[nodiscard]] std::vector<float> embed(const TokenIds& row) const;
  /// What the hypernetwork reads for descriptions of tasks, [descriptions, size]. Throws what `encode` throws.
  [[nodiscard]] std::vector<float> conditioning(std::span<const std::string> descriptions) const;

 private:
  [[nodiscard]] std::vector<float> vector(const TokenIds& row) const;
  [[nodiscard]] std::vector<float> remembered(const TokenIds& row) const;

  using Vectors = std::list<std::pair<TokenIds, std::vector<float>>>;

  const EncoderSpec& spec_;
  ModelSpec limits_;  // what the text's own tokens must keep to
  Ort::Session session_;
  Tokenizer tokenizer_;
  mutable std::mutex mutex_;  // guards what follows
  mutable Vectors vectors_;   // of the descriptions that requests repeat, the last used first
  mutable std::map<TokenIds, Vectors::iterator> places_;
};

}  // namespace chameleon
