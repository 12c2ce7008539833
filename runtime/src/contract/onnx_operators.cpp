#include "contract/onnx_operators.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "chameleon/error.h"

namespace chameleon {

namespace {

// The same lists and limits as in chameleon_deploy/contract/onnx_operators.py, which says why.
const std::map<std::string_view, std::set<std::string_view>> kOperators = {
    {"",
     {"Abs",
      "Add",
      "And",
      "ArgMax",
      "BitwiseXor",
      "Cast",
      "Concat",
      "Constant",
      "CumSum",
      "DequantizeLinear",
      "Div",
      "Equal",
      "Expand",
      "Gather",
      "GatherElements",
      "GatherND",
      "Gelu",
      "Gemm",
      "Greater",
      "If",
      "IsInf",
      "IsNaN",
      "LayerNormalization",
      "LessOrEqual",
      "LogSoftmax",
      "MatMul",
      "Max",
      "Min",
      "Mod",
      "Mul",
      "Or",
      "Pow",
      "QuantizeLinear",
      "Range",
      "Reciprocal",
      "ReduceLogSumExp",
      "ReduceMax",
      "ReduceMean",
      "Relu",
      "Reshape",
      "Shape",
      "Sigmoid",
      "Slice",
      "Softmax",
      "Split",
      "Sqrt",
      "Squeeze",
      "Sub",
      "Tanh",
      "Transpose",
      "Unsqueeze",
      "Where"}},
    {"com.microsoft", {"GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "RotaryEmbedding"}},
};
constexpr std::size_t kMaxFileBytes = 8U << 20U, kMaxEmbeddedBytes = 1U << 20U, kMaxDepth = 4, kMaxValues = 1U << 16U;
constexpr std::uint64_t kMaxCopies = 16, kMaxWidth = 32;
// By TensorProto.DataType.
const std::map<std::uint64_t, std::uint64_t> kWidths = {{1, 4},  {2, 1},  {3, 1},  {4, 2},  {5, 2},  {6, 4},  {7, 8},
                                                        {9, 1},  {10, 2}, {11, 8}, {12, 4}, {13, 8}, {16, 2}, {17, 1},
                                                        {18, 1}, {19, 1}, {20, 1}, {21, 1}, {22, 1}};

enum WireType : std::uint8_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

[[noreturn]] void refuse(const std::string& why) { throw GraphError(why); }

std::string shown(std::string_view name) {
  std::string text = "'";
  for (const char c : name.substr(0, 60)) text += c >= ' ' && c <= '~' ? c : '?';
  return text + "'";
}

/// Read forward over bytes.
class Reader {
 public:
  explicit Reader(std::string_view data) : data_(data) {}
  [[nodiscard]] bool done() const { return at_ == data_.size(); }

  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned int i = 0; i < 10 && !done(); ++i) {
      const auto byte = static_cast<std::uint8_t>(data_[at_++]);
      if (i == 9 && byte > 1) break;  // beyond 64 bits
      value |= static_cast<std::uint64_t>(byte & 0x7FU) << 7U * i;
      if (byte < 0x80) return value;
    }
    refuse("it is not protobuf: a number does not end");
  }

  std::string_view bytes(std::uint64_t size) {
    if (size > data_.size() - at_) refuse("it ends in the middle of a field");
    const std::string_view found = data_.substr(at_, size);
    at_ += size;
    return found;
  }

 private:
  std::string_view data_;
  std::size_t at_ = 0;
};

struct Field {
  std::uint64_t number;
  std::uint64_t wire_type;
  std::uint64_t value;     // of kVarint
  std::string_view bytes;  // of the others
};

using KnownFields = std::map<std::uint64_t, std::set<std::uint64_t>>;  // the wire types that each may have

KnownFields bytes_fields(std::initializer_list<std::uint64_t> numbers, KnownFields others = {}) {
  for (const std::uint64_t number : numbers) others[number] = {kBytes};
  return others;
}

const KnownFields kModel = bytes_fields({2, 3, 4, 6, 7, 8, 14}, {{1, {kVarint}}, {5, {kVarint}}});
const KnownFields kOpset = bytes_fields({1}, {{2, {kVarint}}});
const KnownFields kGraph = bytes_fields({1, 2, 5, 10, 11, 12, 13, 16});
const KnownFields kNode = bytes_fields({1, 2, 3, 4, 5, 6, 7, 9});
const KnownFields kAttribute =
    bytes_fields({1, 4, 5, 6, 9, 13},
                 {{2, {kFixed32}}, {3, {kVarint}}, {7, {kFixed32, kBytes}}, {8, {kVarint, kBytes}}, {20, {kVarint}}});
const KnownFields kTensor = bytes_fields({6, 8, 9, 12, 13, 16}, {{1, {kVarint, kBytes}},
                                                                 {2, {kVarint}},
                                                                 {4, {kFixed32, kBytes}},
                                                                 {5, {kVarint, kBytes}},
                                                                 {7, {kVarint, kBytes}},
                                                                 {10, {kFixed64, kBytes}},
                                                                 {11, {kVarint, kBytes}},
                                                                 {14, {kVarint}}});
const KnownFields kEntry = bytes_fields({1, 2});
const KnownFields kValueInfo = bytes_fields({1, 2, 3, 4});

Field read_field(Reader& reader) {
  const std::uint64_t key = reader.varint();
  Field field{key >> 3U, key & 7U, 0, {}};
  if (field.wire_type == kVarint) {
    field.value = reader.varint();
  } else if (field.wire_type == kBytes) {
    field.bytes = reader.bytes(reader.varint());
  } else if (field.wire_type == kFixed32 || field.wire_type == kFixed64) {
    field.bytes = reader.bytes(field.wire_type == kFixed32 ? 4 : 8);
  } else {
    refuse("it is not protobuf: wire type " + std::to_string(field.wire_type));
  }
  return field;
}

/// The fields of one message, all of which are allowed.
class Message {
 public:
  Message(std::string_view data, const KnownFields& allowed, const char* what) {
    Reader reader(data);
    while (!reader.done()) {
      const Field field = read_field(reader);
      const auto found = allowed.find(field.number);
      if (found == allowed.end() || !found->second.contains(field.wire_type)) {
        refuse(std::string(what) + " has a field " + std::to_string(field.number) + " of wire type " +
               std::to_string(field.wire_type) + ", which export does not write");
      }
      if (fields_.size() == kMaxValues) {
        refuse(std::string(what) + " has more than " + std::to_string(kMaxValues) + " fields");
      }
      fields_.push_back(field);
    }
  }

  [[nodiscard]] std::vector<std::string_view> all(std::uint64_t number) const {
    std::vector<std::string_view> found;
    for (const Field& field : fields_) {
      if (field.number == number) found.push_back(field.bytes);
    }
    return found;
  }

  /// The last, as protobuf reads a field that occurs twice; empty without any.
  [[nodiscard]] std::string_view text(std::uint64_t number) const {
    const auto found = all(number);
    return found.empty() ? std::string_view() : found.back();
  }

  /// Of a repeated field, packed or not.
  [[nodiscard]] std::vector<std::uint64_t> numbers(std::uint64_t number) const {
    std::vector<std::uint64_t> found;
    for (const Field& field : fields_) {
      if (field.number != number) continue;
      if (field.wire_type == kVarint) found.push_back(field.value);
      for (Reader packed(field.bytes); !packed.done();) found.push_back(packed.varint());
    }
    return found;
  }

 private:
  std::vector<Field> fields_;
};

const std::set<std::string_view>& operators_of(std::string_view domain) {
  const auto found = kOperators.find(domain);
  if (found == kOperators.end()) refuse("domain " + shown(domain) + " is none that export uses");
  return found->second;
}

std::uint64_t width_of(std::uint64_t data_type) {
  const auto found = kWidths.find(data_type);
  return found == kWidths.end() ? kMaxWidth : found->second;
}

std::uint64_t last(const std::vector<std::uint64_t>& numbers) { return numbers.empty() ? 0 : numbers.back(); }

/// The values of a constant, each of `width` bytes.
struct Constant {
  std::uint64_t elements, width;
};

/// Of one graph, the names that it gives so far, and those of them whose values are constants.
struct Scope {
  std::set<std::string_view> names;
  std::map<std::string_view, Constant> constants;
};

/// What a node gives whose inputs are constants.
Constant folded(const Message& node, const std::vector<Constant>& inputs) {
  const std::string_view name = node.text(4);
  const auto attributes = node.all(5);
  if (inputs.empty()) {  // a Constant: each byte of its attributes holds two elements at most
    std::uint64_t bytes = 0;
    for (const std::string_view attribute : attributes) bytes += attribute.size();
    return {2 * bytes, 1};
  }
  Constant result = inputs.front();
  if (name == "Cast") {
    result.width = kMaxWidth;
    for (const std::string_view data : attributes) {
      const Message attribute(data, kAttribute, "an attribute");
      if (attribute.text(1) == "to") result.width = width_of(last(attribute.numbers(3)));
    }
  } else if (name == "BitwiseXor" && inputs.back().elements != 1) {  // else the two may widen each other
    refuse("BitwiseXor has a second constant of more than one element");
  } else if (name == "DequantizeLinear") {  // to the type of its scales
    result.width = inputs[std::min<std::size_t>(1, inputs.size() - 1)].width;
  }
  return result;
}

class GraphChecker {
 public:
  explicit GraphChecker(const std::map<std::string, std::int64_t>& sizes) : sizes_(sizes) {
    for (const auto& [name, size] : sizes) room_ += kMaxCopies * static_cast<std::uint64_t>(size);
  }

  void check_graph(std::string_view data) {
    if (scopes_.size() >= kMaxDepth) refuse("graphs in graphs, more than " + std::to_string(kMaxDepth) + " deep");
    const Message graph(data, kGraph, "a graph");
    Scope scope;
    for (const std::string_view tensor : graph.all(5)) check_tensor(tensor, scope);
    for (const auto& [name, constant] : scope.constants) scope.names.insert(name);
    for (const std::string_view input : graph.all(11))
      scope.names.insert(Message(input, kValueInfo, "an input").text(1));
    scopes_.push_back(std::move(scope));
    for (const std::string_view node : graph.all(1)) check_node(Message(node, kNode, "a node"));
    scopes_.pop_back();
  }

 private:
  void check_node(const Message& node) {
    const std::string_view name = node.text(4), domain = node.text(7);
    if (!operators_of(domain).contains(name)) {
      refuse("operator " + shown(name) + " of domain " + shown(domain) + " is none that export writes");
    }
    const auto written = node.all(2);
    if (const auto constants = constant_inputs(node)) {
      if (name != "Constant" && name != "BitwiseXor" && name != "Cast" && name != "DequantizeLinear" &&
          name != "Transpose") {
        refuse(std::string(name) + " has constant inputs only");
      }
      for (const std::string_view output : written) {
        scopes_.back().constants[output] = count(output, folded(node, *constants));
      }
    }
    for (const std::string_view attribute : node.all(5)) check_attribute(attribute);
    scopes_.back().names.insert(written.begin(), written.end());
  }

  /// The inputs of a node, or none if one of them is no constant.
  [[nodiscard]] std::optional<std::vector<Constant>> constant_inputs(const Message& node) const {
    std::vector<Constant> constants;
    bool all = true;
    for (const std::string_view input : node.all(1)) {
      if (input.empty()) continue;  // an optional input that is left out
      if (std::ranges::none_of(scopes_, [&](const Scope& scope) { return scope.names.contains(input); })) {
        refuse(std::string(node.text(4)) + " reads " + shown(input) + ", which nothing before it gives");
      }
      const auto scope = std::find_if(scopes_.rbegin(), scopes_.rend(),
                                      [&](const Scope& each) { return each.constants.contains(input); });
      if (scope == scopes_.rend()) {
        all = false;
      } else {
        constants.push_back(scope->constants.at(input));
      }
    }
    return all ? std::optional(constants) : std::nullopt;
  }

  /// Count the bytes of a constant.
  Constant count(std::string_view name, Constant constant) {
    if (constant.elements > room_ / constant.width) {
      refuse(shown(name) + " is one constant too many: they take more than " + std::to_string(kMaxCopies) +
             " times the bundle's size");
    }
    room_ -= constant.elements * constant.width;
    return constant;
  }

  void check_attribute(std::string_view data) {
    const Message attribute(data, kAttribute, "an attribute");
    const auto graphs = attribute.all(6);
    for (const std::string_view graph : graphs) check_graph(graph);
    for (const std::string_view tensor : attribute.all(5)) {
      Scope unnamed;
      check_tensor(tensor, unnamed);
    }
    if (graphs.empty() && data.size() > kMaxEmbeddedBytes) {
      refuse("an attribute of more than " + std::to_string(kMaxEmbeddedBytes) + " bytes");
    }
  }

  /// Check where a tensor's values are and that there are enough for its dimensions.
  void check_tensor(std::string_view data, Scope& scope) {
    const Message tensor(data, kTensor, "a tensor");
    const std::string_view name = tensor.text(8);
    if (scope.constants.contains(name)) refuse(shown(name) + " is there twice");
    if (data.size() > kMaxEmbeddedBytes) {
      refuse(shown(name) + " is a constant of more than " + std::to_string(kMaxEmbeddedBytes) +
             " bytes in the graph's file");
    }
    const bool external = !tensor.all(13).empty() || last(tensor.numbers(14)) != 0;
    const std::uint64_t most = 2 * (external ? external_size(tensor) : data.size());  // the smallest have 4 bits
    std::uint64_t elements = 1;
    for (const std::uint64_t dimension : tensor.numbers(1)) {
      if (dimension > most || (dimension > 0 && elements > most / dimension)) {
        refuse(shown(name) + " has more elements than stored values");
      }
      elements *= dimension;
    }
    scope.constants[name] = count(name, {elements, width_of(last(tensor.numbers(2)))});
  }

  [[nodiscard]] std::uint64_t external_size(const Message& tensor) const {
    std::optional<std::string> location;
    for (const std::string_view data : tensor.all(13)) {
      const Message entry(data, kEntry, "an external data entry");
      if (entry.text(1) != "location") continue;
      if (location) refuse(shown(tensor.text(8)) + " has its data in two places");
      location = entry.text(2);
    }
    const auto found = sizes_.find(location.value_or(""));
    if (found == sizes_.end()) {
      refuse(shown(tensor.text(8)) + " has its data in " + shown(location.value_or("")) +
             ", which the bundle does not list");
    }
    return static_cast<std::uint64_t>(found->second);
  }

  const std::map<std::string, std::int64_t>& sizes_;
  std::vector<Scope> scopes_;  // of a graph and of those around it, outermost first
  std::uint64_t room_ = 0;     // bytes that further constants may take
};

}  // namespace

void check_model(std::span<const std::byte> data, const std::map<std::string, std::int64_t>& sizes,
                 const std::string& where) try {
  if (data.size() > kMaxFileBytes) {
    refuse("a graph of more than " + std::to_string(kMaxFileBytes) + " bytes: weights belong in weights.bin");
  }
  const Message model({reinterpret_cast<const char*>(data.data()), data.size()}, kModel, "the model");
  for (const std::string_view opset : model.all(8)) operators_of(Message(opset, kOpset, "an opset").text(1));
  const auto graphs = model.all(7);
  if (graphs.size() != 1) refuse("it is not one ONNX graph");
  GraphChecker(sizes).check_graph(graphs.front());
} catch (const GraphError& error) {
  throw GraphError(where + ": " + error.what() + ": export again");
}

}  // namespace chameleon
