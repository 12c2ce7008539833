/// The C++ runtime of chameleon-deploy: load a bundle, adapt a batch, score it, generate from it.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <variant>
#include <vector>

#include "chameleon/adaptation.h"
#include "chameleon/bundle.h"
#include "chameleon/error.h"
#include "chameleon/generation.h"
#include "chameleon/sampling.h"
#include "chameleon/scoring.h"
#include "chameleon/tokenizer.h"

namespace chameleon {

using TokenIds = std::vector<std::int64_t>;

/// A batch: texts, or lists of token ids.
using Texts = std::variant<std::span<const std::string>, std::span<const TokenIds>>;

/// An adapter of the bundle, or one that was loaded.
struct AdapterInfo {
  std::string name;
  std::int64_t rank;                  ///< without padding
  std::vector<std::string> targets;   ///< the layers that it updates
  std::size_t size;                   ///< bytes of its factors in memory
  std::optional<std::string> digest;  ///< the SHA-256 of its file or its directory's files; none of one of the bundle
  std::size_t uses;                   ///< how many texts have chosen it, alone or with others
  bool operator==(const AdapterInfo&) const = default;
};

struct LoadOptions {
  std::string provider = "cpu";  ///< cpu, tensorrt in a build that has it, or auto for the best of them
  std::optional<Mode> mode{};    ///< default mode of the calls: by default cohort, or static in regime lora
  std::optional<int> threads{};  ///< of ONNX Runtime, within one operator; by default it chooses
  bool map_weights = false;      ///< true maps the weights instead of packing a copy of them: about half of the memory,
                                 ///< shared between processes; slower in batches, and last bits differ; no effect where
                                 ///< integer_weights is uint8
  TrustedKeys trusted_keys{};    ///< a bundle that none of them signed throws SignatureError; nothing accepts any
  std::optional<std::size_t> max_adapter_bytes{};  ///< of the factors of loaded adapters that stay in memory: others
                                                   ///< are read again when a row names them; by default, all stay
};

/// A loaded bundle. It keeps no state of requests: one runtime serves any number of threads.
class CHAMELEON_EXPORT Runtime {
 public:
  /// Open a bundle and prepare it for running. Every file is checked before anything runs. Throws an Error.
  explicit Runtime(const std::filesystem::path& path, const LoadOptions& options = {});
  Runtime(Runtime&&) noexcept;
  ~Runtime();

  /// Embed and cluster a batch and generate its factors.
  /// Throws InputError, TokenError, LengthError, ModeError, FactorsError or AdapterError.
  [[nodiscard]] Adaptation adapt(Texts texts, const Adapt& adapt = {}) const;

  /// Log-probability of every token of every text, given the tokens before it.
  /// stop: ends the call without results. Throws CancelledError.
  [[nodiscard]] std::vector<Score> score(Texts texts, const Adapt& adapt = {}, const std::stop_token& stop = {}) const;

  /// What would have chosen each token of a text after its first, with the `count` most probable tokens (0 to 20) at
  /// each place, as Sampling::logprobs reports them. factors: a row for each text, as `adapt` returns them Throws
  /// InputError, TokenError, LengthError, NumericError or CancelledError.
  [[nodiscard]] std::vector<std::vector<Choice>> prompt_logprobs(Texts texts, const RowFactors& factors, int count,
                                                                 const std::stop_token& stop = {}) const;

  /// Continue every prompt. The factors of a row are made from its prompt and do not change.
  /// stop: cancels all rows, even within a long prompt
  /// Throws what `adapt` throws, InputError and ProviderError for drafts that this decoder would read to other tokens.
  std::vector<Generation> generate(Texts prompts, const Generate& generate = {}, const Adapt& adapt = {},
                                   OnError errors = OnError::raise, const std::stop_token& stop = {}) const;
  /// The same, token by token. A callback's exception ends the call.
  std::vector<Generation> stream(Texts prompts, const OnToken& on_token, const Generate& generate = {},
                                 const Adapt& adapt = {}, OnError errors = OnError::raise,
                                 const std::stop_token& stop = {}) const;

  /// Add an adapter from a file that `adapter` wrote for this base model, or from a PEFT LoRA directory. All of it is
  /// read and checked; calls that run are not affected. From any thread.
  /// replace: an adapter of a file under the same name; rows that use it keep its factors, later ones have the new
  /// Throws InputError for a name that cannot be used, AdapterError for a name that is taken or what is not an adapter
  /// of this bundle, CheckpointError for a directory that is no plain LoRA, TensorError for tensors that do not fit.
  /// Then nothing is loaded.
  void load_adapter(const std::string& name, const std::filesystem::path& path, bool replace = false);
  /// Forget an adapter; rows that use it keep its factors. From any thread. Throws AdapterError for an unknown name.
  void unload_adapter(const std::string& name);
  /// Of the bundle's adapters and those that were loaded, in that order.
  [[nodiscard]] std::vector<std::string> adapter_names() const;
  /// The same adapters, in the same order.
  [[nodiscard]] std::vector<AdapterInfo> adapters() const;

  /// The token ids of texts. Makes the same checks as the calls above.
  [[nodiscard]] std::vector<TokenIds> encode(Texts texts) const;

  /// The provider that runs the decoder: cpu or tensorrt, also with provider `auto`.
  [[nodiscard]] const std::string& provider() const;
  /// The type of the weights in integer products, "int8" or "uint8": that which ONNX Runtime multiplies exactly on this
  /// machine. Nothing for a bundle without integer products.
  [[nodiscard]] const std::optional<std::string>& integer_weights() const;
  [[nodiscard]] const Bundle& bundle() const;
  [[nodiscard]] const Manifest& manifest() const;
  [[nodiscard]] const Tokenizer& tokenizer() const;

  struct Impl;  ///< of the library itself
  [[nodiscard]] const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<const Impl> impl_;
};

}  // namespace chameleon
