// A call of a shared-cache decoder whose inputs and outputs are bound once: fill in the numbers, then run.
#pragma once

#include "chameleon/factors.h"
#include "decode/decoder.h"
#include "decode/session.h"

namespace chameleon {

/// A decoder's graph whose past and present are one buffer, written in place at each row's own length.
struct SharedCacheGraph {
  SharedCacheGraph(Ort::Session opened, const Manifest& manifest);

  /// Bytes of one row in the buffer of one layer's keys or values.
  [[nodiscard]] std::size_t row_bytes(std::size_t capacity) const;
  /// Bytes of a whole cache. Throws std::bad_alloc for more than the address space.
  [[nodiscard]] std::size_t cache_bytes(std::size_t rows, std::size_t capacity) const;

  /// Whether a call of several tokens gives what as many of one token give, up to the order of sums.
  [[nodiscard]] bool is_exact() const { return cache_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  Ort::Session session;
  ModelSpec model;
  ONNXTensorElementDataType cache_type;    ///< of the cache: float32, or int8 in an int8 bundle
  std::vector<std::string> past, present;  ///< names of the cache's inputs and outputs, in the order of its buffers
  std::vector<std::string> factors;        ///< names of the factors' inputs, in the order of FactorSets::tensors
  bool has_columns;                        ///< whether some factors are of the trunk, so that column_ids is an input
};

/// Keys and values of a batch: [buffers, rows, heads, capacity, head_dim], where every layer has a buffer of keys and
/// one of values.
struct CacheBuffers {
  std::byte* memory;
  std::size_t rows, capacity;

  /// Copy `length` tokens of a row of `other`, which may be these buffers themselves, to row `target`.
  /// from, to: the first of them in each row
  void copy_row(const SharedCacheGraph& graph, const CacheBuffers& other, std::size_t source, std::size_t target,
                std::size_t length, std::size_t from = 0, std::size_t to = 0) const;
};

/// One shape of call. Its arrays are filled in before a run.
class BoundCall {
 public:
  /// What a call returns besides the cache.
  enum class Output { logits, hidden_states };

  /// Bind a call over `batch` rows of a cache, beginning with row `first`, of `width` tokens each.
  /// positions: how many positions of a row have an output
  /// output: memory for [batch, positions, vocab or hidden]; empty allocates it
  BoundCall(const SharedCacheGraph& graph, const CacheBuffers& cache, std::size_t first, std::size_t batch,
            std::size_t width, std::size_t positions, Output kind, std::span<float> output = {});
  BoundCall(const BoundCall&) = delete;
  BoundCall& operator=(const BoundCall&) = delete;

  std::vector<std::int64_t> input_ids, position_ids;  ///< [batch, width]
  std::vector<std::int64_t> logits_positions;         ///< [batch, positions]
  std::vector<std::int32_t> seqlens_k;                ///< [batch], real tokens of each row after the call, minus one
  std::int32_t total_sequence_length = 0;             ///< the longest row's tokens after the call

  /// Fill in a call that appends tokens to rows of these lengths. Outputs are of each row's last position where a row
  /// has one output, else of the first positions.
  void append(Rows rows, std::span<const std::int64_t> lengths);

  /// Returns the output, which the next run overwrites. Throws GraphError.
  std::span<float> run(const RowFactors& factors, const std::stop_token& stop = {});
  /// [batch, positions, vocab or hidden]
  [[nodiscard]] std::span<float> output() const { return output_; }

 private:
  template <class T>
  void bind_input(const char* name, std::span<T> values, std::initializer_list<std::int64_t> shape);
  void bind_factors(const FactorSets& sets);

  const SharedCacheGraph& graph_;
  std::int64_t num_logits_;
  std::vector<std::int64_t> factor_ids_, column_ids_;
  std::vector<float> own_output_;
  std::span<float> output_;
  FactorSets sets_;  // those that are bound
  std::vector<const char*> input_names_, output_names_;
  std::vector<Ort::Value> inputs_, outputs_;  // the last inputs are the factors, and column_ids if there are columns
};

}  // namespace chameleon
