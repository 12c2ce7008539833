#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "chameleon/export.h"

namespace chameleon {

/// What the factors of a row depend on (docs/design.md, section 3).
enum class Mode { none, static_, centroid, request, cohort, tenant };

CHAMELEON_EXPORT std::string_view to_string(Mode mode);
/// Throws ModeError for a word that is not a mode.
CHAMELEON_EXPORT Mode parse_mode(std::string_view name);

using Dimension = std::variant<std::int64_t, std::string>;  ///< a number, or a symbol such as "batch"

/// An input or output of a graph.
struct TensorSpec {
  std::string name;
  std::string dtype;  ///< float32, float16, bfloat16, int8, int32 or int64
  std::vector<Dimension> shape;
  bool operator==(const TensorSpec&) const = default;
};

/// A named graph: its role, the providers that may run it, and its signature.
struct GraphSpec {
  std::string file;
  std::string role;  ///< decoder, hypernetwork, encoder, chooser, logits_scorer or hidden_scorer
  /// Decoders only: "growing" (the graph concatenates past and present) or "shared" (both are one buffer).
  std::optional<std::string> cache;
  std::vector<std::string> providers;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
};

/// A tensor inside a weights file: little-endian, row-major, at a byte offset.
struct StoredTensor {
  std::string file;
  std::string dtype;  ///< float32, float16 or int8
  std::vector<std::int64_t> shape;
  std::int64_t offset = 0;
  std::optional<std::int64_t> row_scales_offset;      ///< int8: of the rows' scales, float32
  std::optional<std::int64_t> channel_scales_offset;  ///< int8: of the channels' scales, float32
  std::optional<std::int64_t> rotation;               ///< int8: how many channels a Hadamard matrix rotates together
};

struct FileSpec {
  std::int64_t size = 0;
  std::string sha256;
};

struct ModelSpec {
  std::string architecture;
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;
  std::int64_t eos_token_id = 0;
};

/// The language-model head, by its PEFT name.
inline constexpr std::string_view kHead = "lm_head";

/// Whether an adapter may have this name: what kAdapterName says.
CHAMELEON_EXPORT bool is_adapter_name(std::string_view name);
inline constexpr std::size_t kMaxInvocationTokens = 256;  ///< of an activated adapter
inline constexpr std::string_view kAdapterName =
    "at most 64 letters, digits, '_', '-' and '.', the first a letter or a digit, and no mode's name";

/// A linear layer that the factors adapt, by its PEFT name: A is [rank, in_features], B is [rank, out_features].
struct TargetSpec {
  std::string name;
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
};

/// alpha is recorded, not applied: export folds it into the factors.
struct AdaptationSpec {
  std::string regime;  ///< base, chameleon or lora
  std::int64_t rank = 0;
  double alpha = 0;
  std::vector<TargetSpec> targets;
  std::int64_t num_clusters = 0;
  std::string protocol;  ///< masked or paper
  std::int64_t max_length = 0;
  std::vector<std::string> adapters;  ///< names of the trained sets; none if the one set has no name
  std::map<std::string, std::vector<std::int64_t>> invocation_tokens;  ///< of those that are activated, by name
  std::string base_digest;  ///< of the base model's weights; empty in a bundle that takes no adapters
  /// Of a vector that the caller gives with every text; 0: texts are conditioned on embeddings.
  std::int64_t conditioning_size = 0;

  /// The last dimension of every factor tensor, by name, such as "lm_head.lora_A"; the others are [factor_sets, rank].
  [[nodiscard]] CHAMELEON_EXPORT std::map<std::string, std::int64_t> factor_widths() const;
};

/// The sentence encoder, which turns descriptions of tasks into conditioning vectors.
struct EncoderSpec {
  std::int64_t size = 0;  ///< of an embedding
  std::int64_t vocab_size = 0;
  std::int64_t max_tokens = 0;                       ///< of a text, special tokens included
  std::vector<std::int64_t> prefix_ids, suffix_ids;  ///< the special tokens around a text
  /// The length to which an embedding is brought before the hypernetwork reads it; 0 leaves it.
  double conditioning_norm = 0;
  bool full_stop = false;  ///< whether a description that ends in a letter gets a full stop
};
inline constexpr const char* kEncoderTokenizer = "encoder_tokenizer.json";

/// Parameter counts: the frozen base model, one factor set, the hypernetwork (0 without one).
struct Parameters {
  std::int64_t base = 0;
  std::int64_t factors = 0;
  std::int64_t hypernetwork = 0;
};

/// The largest call that engines with fixed profiles (TensorRT) accept; ONNX Runtime has no such limits.
struct LimitsSpec {
  std::int64_t batch = 0;        ///< rows
  std::int64_t sequence = 0;     ///< tokens of a row in one call
  std::int64_t past = 0;         ///< tokens of a row that are in the cache already
  std::int64_t factor_sets = 0;  ///< factor sets
};

/// verified is false when the export skipped verification; parity.json has the figures.
struct ParitySummary {
  bool verified = false;
  std::int64_t checks = 0;
  std::optional<double> max_abs_logit_difference;
  std::optional<double> accepted_kl;  ///< the mean KL that the export was told to accept, in place of the gate
};

/// The content of bundle.json.
struct Manifest {
  std::string format;
  std::int64_t format_version = 0;
  std::string precision;
  ModelSpec model;
  AdaptationSpec adaptation;
  LimitsSpec limits;
  Parameters parameters;
  std::map<std::string, GraphSpec> graphs;
  StoredTensor token_embedding;
  std::map<std::string, FileSpec> files;
  ParitySummary parity;
  std::string checkpoint_digest;
  std::map<std::string, std::string> tools;
  std::optional<EncoderSpec> encoder{};  ///< of texts that describe tasks, in a bundle that has one

  /// Whether factors have to enter a basis: those of an int8 trunk.
  [[nodiscard]] CHAMELEON_EXPORT bool has_basis() const;
  /// The length of a vector that the hypernetwork reads: the caller's, or a text embedding.
  [[nodiscard]] CHAMELEON_EXPORT std::int64_t hypernetwork_width() const;
};

/// The modes that a bundle can serve: generated factors need a hypernetwork, cohorts need centroids.
CHAMELEON_EXPORT std::vector<Mode> available_modes(const AdaptationSpec& spec);

/// Decode and cross-check bundle.json; `where` is named in messages.
/// Throws ManifestError, VersionError or PathError.
CHAMELEON_EXPORT Manifest parse_manifest(std::string_view raw, const std::filesystem::path& where);

}  // namespace chameleon
