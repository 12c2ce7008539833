#include "device/tensorrt.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>

#include "chameleon/error.h"
#include "contract/mapped_file.h"
#include "decode/logits_scorer.h"
#include "device/cuda.h"
#include "device/tensorrt_logger.h"
#include "device/tensorrt_target.h"

namespace chameleon {

namespace {

constexpr int kPrefill = 0, kDecode = 1;  // the decoder's optimization profiles
constexpr std::size_t kAlignment = 256;   // bytes: the alignment that TensorRT requires

/// Keys and values of every layer, [batch, heads, width, head_dim], each at the beginning of its own stretch of a
/// buffer. A step reads one buffer and writes the values with one more token into the other.
struct TwoBuffers final : Cache {
  DeviceMemory past, present;
  std::size_t stretch;                  // bytes
  std::size_t width = 0;                // tokens in the cache, padding included
  std::size_t capacity;                 // the largest width
  std::vector<std::vector<bool>> mask;  // [batch][width], whether a token is a real one
  std::vector<std::int64_t> lengths;    // [batch], real tokens per row: the next token's position
  std::map<std::string, DeviceMemory> factors;

  TwoBuffers(std::size_t stretches, std::size_t stretch_size, std::size_t largest, const FactorSets& sets)
      : past(stretches * stretch_size), present(stretches * stretch_size), stretch(stretch_size), capacity(largest) {
    for (const auto& [name, values] : sets.tensors) {
      const DeviceMemory& memory = factors.try_emplace(name, values.size_bytes()).first->second;
      check(cudaMemcpy(memory.at(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice), name);
    }
  }
};

class TensorRTDecoder final : public StaticDecoder {
 public:
  TensorRTDecoder(const Bundle& bundle, const std::filesystem::path& file);
  ~TensorRTDecoder() override { cudaStreamDestroy(stream_); }
  TensorRTDecoder(TensorRTDecoder&&) = delete;

  std::pair<Logits, std::unique_ptr<Cache>> prefill(Rows rows, const RowFactors& factors,
                                                    std::size_t capacity) const override;
  Logits step(std::span<const std::int64_t> token_ids, const RowFactors& factors, Cache& cache) const override;
  void select(Cache& cache, std::span<const std::size_t> rows) const override;
  void all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                  const std::stop_token& stop) const override;
  [[nodiscard]] std::vector<std::vector<float>> token_logprobs(Rows rows, const RowFactors& factors,
                                                               const std::stop_token& stop) const override;

 private:
  using Numbers = std::vector<std::int64_t>;

  /// Throws LengthError for a call that the engine's profiles do not accept. width: the cache's in the end
  void check_limits(Rows rows, const FactorSets& sets, std::size_t width) const;
  [[nodiscard]] Logits read(Rows rows, const RowFactors& factors, bool last_only, TwoBuffers& cache) const;
  [[nodiscard]] Logits read_whole(Rows rows, const RowFactors& factors) const;
  /// An empty cache of `width` tokens per row for a batch that is within the limits.
  [[nodiscard]] TwoBuffers empty_cache(Rows rows, const FactorSets& sets, std::size_t width) const;
  /// One call: the host's inputs by name, and shapes. The cache grows by `sequence` tokens.
  [[nodiscard]] Logits run(int profile, std::map<std::string, Numbers> numbers, std::size_t sequence,
                           std::size_t positions, const FactorSets& sets, TwoBuffers& cache) const;
  [[nodiscard]] std::size_t row_bytes(std::size_t width) const;

  ModelSpec model_;
  LimitsSpec limits_;
  std::vector<std::string> past_;  // names of the cache's inputs
  std::size_t item_size_;          // bytes of a value in the cache
  mutable Logger logger_;          // outlives the objects that use it
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  cudaStream_t stream_ = nullptr;
  mutable std::mutex mutex_;  // guards the contexts and the stream: a GPU does one thing at a time
};

std::size_t item_size(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16:
      return 2;
    default:
      throw GraphError("the engine's cache has a type that this runtime does not know: build it again");
  }
}

TensorRTDecoder::TensorRTDecoder(const Bundle& bundle, const std::filesystem::path& file)
    : model_(bundle.manifest.model), limits_(bundle.manifest.limits) {
  const MappedFile content(file);
  runtime_.reset(nvinfer1::createInferRuntime(logger_));
  if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(content.bytes().data(), content.bytes().size()));
  if (!engine_) throw ProviderError(file.string() + ": TensorRT cannot read it: " + logger_.last());
  check(cudaStreamCreate(&stream_), "creating a stream");
  for (const int profile : {kPrefill, kDecode}) {
    // Memory for the chosen profile only: a step needs far less than the longest prompts.
    contexts_[profile].reset(
        engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
    if (!contexts_[profile] || !contexts_[profile]->setOptimizationProfileAsync(profile, stream_)) {
      throw DeviceError("TensorRT cannot create an execution context: " + logger_.last());
    }
  }
  for (const TensorSpec& input : bundle.graph("decoder", "tensorrt").inputs) {
    if (input.name.starts_with("past_key_values.")) past_.push_back(input.name);
  }
  item_size_ = item_size(engine_->getTensorDataType(past_.at(0).c_str()));
}

std::size_t TensorRTDecoder::row_bytes(std::size_t width) const {
  return static_cast<std::size_t>(model_.num_key_value_heads * model_.head_dim) * width * item_size_;
}

void TensorRTDecoder::check_limits(Rows rows, const FactorSets& sets, std::size_t width) const {
  const auto longest = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  const auto require = [](const char* name, std::size_t given, std::int64_t limit) {
    if (static_cast<std::int64_t>(given) <= limit) return;
    throw LengthError(std::string(name) + " " + std::to_string(given) + ": the engines of this bundle accept " +
                      std::to_string(limit) + "; export it again with a larger `" + name +
                      "` under [limits] of its recipe");
  };
  require("batch", rows.size(), limits_.batch);
  require("factor_sets", static_cast<std::size_t>(sets.count), limits_.factor_sets);
  require("sequence", longest, limits_.sequence);
  require("past", width - 1, limits_.past);
}

TwoBuffers TensorRTDecoder::empty_cache(Rows rows, const FactorSets& sets, std::size_t width) const {
  check_limits(rows, sets, width);
  const std::size_t stretch = (rows.size() * row_bytes(width) + kAlignment - 1) / kAlignment * kAlignment;
  return TwoBuffers(past_.size(), stretch, width, sets);
}

std::pair<Logits, std::unique_ptr<Cache>> TensorRTDecoder::prefill(Rows rows, const RowFactors& factors,
                                                                   std::size_t capacity) const {
  const auto size = &std::span<const std::int64_t>::size;
  const auto longest = std::ranges::max(rows, {}, size).size(), shortest = std::ranges::min(rows, {}, size).size();
  // Rows share the columns of the cache: the shortest row continues after the end of the longest.
  const std::size_t width = longest + std::max(capacity, longest) - shortest;
  const std::lock_guard lock(mutex_);
  auto cache = std::make_unique<TwoBuffers>(empty_cache(rows, factors.sets, width));
  Logits logits = read(rows, factors, true, *cache);
  return {std::move(logits), std::move(cache)};
}

Logits TensorRTDecoder::step(std::span<const std::int64_t> token_ids, const RowFactors& factors,
                             Cache& any_cache) const {
  auto& cache = dynamic_cast<TwoBuffers&>(any_cache);
  if (cache.width >= cache.capacity) throw LengthError("the cache is full: pass a larger capacity to prefill");
  const std::lock_guard lock(mutex_);
  for (auto& row : cache.mask) row.push_back(true);
  std::map<std::string, Numbers> numbers = {{"input_ids", {token_ids.begin(), token_ids.end()}},
                                            {"position_ids", cache.lengths},
                                            {"logits_positions", Numbers(token_ids.size(), 0)},
                                            {"factor_ids", factors.factor_ids}};
  for (std::int64_t& length : cache.lengths) ++length;
  return run(kDecode, std::move(numbers), 1, 1, factors.sets, cache);
}

void TensorRTDecoder::all_logits(Rows rows, const RowFactors& factors, const TakeLogits& take,
                                 const std::stop_token& /*stop*/) const {
  take(0, read_whole(rows, factors));
}

std::vector<std::vector<float>> TensorRTDecoder::token_logprobs(Rows rows, const RowFactors& factors,
                                                                const std::stop_token& stop) const {
  return logprobs_of_logits(rows, factors, static_cast<std::size_t>(limits_.batch), stop,
                            std::bind_front(&TensorRTDecoder::read_whole, this));
}

/// The logits of every position.
Logits TensorRTDecoder::read_whole(Rows rows, const RowFactors& factors) const {
  const auto width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  const std::lock_guard lock(mutex_);
  TwoBuffers cache = empty_cache(rows, factors.sets, width);
  return read(rows, factors, false, cache);
}

void TensorRTDecoder::select(Cache& any_cache, std::span<const std::size_t> rows) const {
  auto& cache = dynamic_cast<TwoBuffers&>(any_cache);
  const std::lock_guard lock(mutex_);
  const std::size_t row = row_bytes(cache.width);
  for (std::size_t i = 0; i < rows.size(); ++i) {  // ascending: no row is overwritten before it is copied
    if (i == rows[i]) continue;
    check(cudaMemcpy2DAsync(cache.past.at(i * row), cache.stretch, cache.past.at(rows[i] * row), cache.stretch, row,
                            past_.size(), cudaMemcpyDeviceToDevice, stream_),
          "moving rows of the cache");
    cache.mask[i] = cache.mask[rows[i]];
    cache.lengths[i] = cache.lengths[rows[i]];
  }
  cache.mask.resize(rows.size());
  cache.lengths.resize(rows.size());
}

/// Read whole rows into an empty cache.
Logits TensorRTDecoder::read(Rows rows, const RowFactors& factors, bool last_only, TwoBuffers& cache) const {
  const std::size_t width = std::ranges::max(rows, {}, &std::span<const std::int64_t>::size).size();
  Numbers input_ids(rows.size() * width), position_ids(rows.size() * width), logits_positions;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto begin = static_cast<std::ptrdiff_t>(row * width);
    std::ranges::copy(rows[row], input_ids.begin() + begin);
    std::iota(position_ids.begin() + begin, position_ids.begin() + begin + static_cast<std::ptrdiff_t>(width), 0);
    const auto length = static_cast<std::int64_t>(rows[row].size());
    if (last_only) logits_positions.push_back(length - 1);
    cache.lengths.push_back(length);
    cache.mask.emplace_back(width, false);
    std::fill_n(cache.mask.back().begin(), length, true);
  }
  if (!last_only) logits_positions = position_ids;
  std::map<std::string, Numbers> numbers = {{"input_ids", std::move(input_ids)},
                                            {"position_ids", std::move(position_ids)},
                                            {"logits_positions", std::move(logits_positions)},
                                            {"factor_ids", factors.factor_ids}};
  return run(kPrefill, std::move(numbers), width, last_only ? 1 : width, factors.sets, cache);
}

Logits TensorRTDecoder::run(int profile, std::map<std::string, Numbers> numbers, std::size_t sequence,
                            std::size_t positions, const FactorSets& sets, TwoBuffers& cache) const {
  nvinfer1::IExecutionContext& context = *contexts_[profile];
  const auto batch = static_cast<std::int64_t>(cache.lengths.size());
  const auto past = static_cast<std::int64_t>(cache.width);
  const auto require = [&](bool done, const std::string& what) {
    if (!done) throw DeviceError("TensorRT refused " + what + ": " + logger_.last());
  };
  const auto bind = [&](const std::string& name, std::byte* address, std::initializer_list<std::int64_t> shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::ranges::copy(shape, dims.d);
    require(context.setInputShape(name.c_str(), dims), "the shape of " + name);
    require(context.setTensorAddress(name.c_str(), address), "the address of " + name);
  };

  for (const auto& row : cache.mask) {
    for (const bool real : row) numbers["attention_mask"].push_back(real ? 1 : 0);
  }
  std::vector<DeviceMemory> uploaded;  // freed after the stream has been synchronized
  for (const auto& [name, values] : numbers) {
    const std::size_t size = values.size() * sizeof(std::int64_t);
    const DeviceMemory& memory = uploaded.emplace_back(size);
    check(cudaMemcpyAsync(memory.at(), values.data(), size, cudaMemcpyHostToDevice, stream_), name);
    if (name == "factor_ids") {
      bind(name, memory.at(), {batch});
    } else {
      bind(name, memory.at(), {batch, static_cast<std::int64_t>(values.size()) / batch});
    }
  }
  for (const auto& [name, values] : sets.tensors) {
    const auto width = static_cast<std::int64_t>(values.size()) / (sets.count * sets.rank);
    bind(name, cache.factors.at(name).at(), {sets.count, sets.rank, width});
  }
  for (std::size_t i = 0; i < past_.size(); ++i) {
    bind(past_[i], cache.past.at(i * cache.stretch), {batch, model_.num_key_value_heads, past, model_.head_dim});
    const std::string present = "present" + past_[i].substr(past_[i].find('.'));
    require(context.setTensorAddress(present.c_str(), cache.present.at(i * cache.stretch)),
            "the address of " + present);
  }
  const auto vocab = static_cast<std::size_t>(model_.vocab_size);
  const std::size_t count = static_cast<std::size_t>(batch) * positions * vocab;
  const DeviceMemory logits(count * sizeof(float));
  require(context.setTensorAddress("logits", logits.at()), "the address of logits");
  require(context.enqueueV3(stream_), "to run");
  const auto values = std::make_shared<std::vector<float>>(count);
  check(cudaMemcpyAsync(values->data(), logits.at(), count * sizeof(float), cudaMemcpyDeviceToHost, stream_), "logits");
  check(cudaStreamSynchronize(stream_), "running the decoder");
  std::swap(cache.past, cache.present);
  cache.width += sequence;
  return {values->data(), positions, vocab, values};
}

}  // namespace

std::unique_ptr<const Decoder> open_tensorrt(const Bundle& bundle) {
  const GraphSpec& graph = bundle.graph("decoder", "tensorrt");
  const auto name =
      std::ranges::find_if(bundle.manifest.graphs, [&](const auto& entry) { return &entry.second == &graph; })->first;
  return std::make_unique<const TensorRTDecoder>(bundle, find_engines(bundle, current_target()) / (name + ".engine"));
}

}  // namespace chameleon
