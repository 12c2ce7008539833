#include "contract/safetensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "chameleon/error.h"
#include "contract/json_fields.h"

namespace chameleon {

namespace {

struct Entry {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> data_offsets;
};

void read(const Json& json, const std::string& at, Entry& entry) {
  Fields(json, at)
      .required("dtype", entry.dtype)
      .required("shape", entry.shape)
      .required("data_offsets", entry.data_offsets);  // others are ignored, as by the library safetensors
}

struct Header {
  std::map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;
};

Header read_header(std::string_view text, const std::string& where) try {
  Header header;
  Json json = Json::parse(text);
  if (const auto found = json.find("__metadata__"); found != json.end()) {
    if (!found->is_null()) chameleon::read(*found, where + ".__metadata__", header.metadata);
    json.erase(found);
  }
  chameleon::read(json, where, header.entries);
  return header;
} catch (const Json::exception&) {  // whose words hold bytes of the file
  throw TensorError(where + ": its header is malformed JSON");
} catch (const ManifestError& error) {  // json_fields.h throws it; here a tensor is at fault
  throw TensorError(error.what());
}

/// Bytes of one value; none for a type that is unknown.
std::optional<std::int64_t> size_of(std::string_view dtype) {
  constexpr std::pair<std::string_view, std::int64_t> sizes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
      {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}, {"C64", 8}};
  for (const auto& [name, size] : sizes) {
    if (name == dtype) return size;
  }
  return std::nullopt;
}

/// Whether a tensor's offsets are those of its values.
bool fits(const Entry& entry, std::size_t data_size) {
  const auto item = size_of(entry.dtype);
  if (!item || entry.data_offsets.size() != 2) return false;
  std::int64_t size = *item;
  for (const std::int64_t dimension : entry.shape) {
    if (dimension < 0 || __builtin_mul_overflow(size, dimension, &size)) return false;
  }
  const std::int64_t begin = entry.data_offsets[0], end = entry.data_offsets[1];
  return begin >= 0 && begin <= end && end <= static_cast<std::int64_t>(data_size) && end - begin == size;
}

/// Whether the tensors follow each other from the beginning of the data to its end.
bool cover(const std::map<std::string, Entry>& entries, std::size_t data_size) {
  std::vector<std::vector<std::int64_t>> offsets;
  for (const auto& [name, entry] : entries) offsets.push_back(entry.data_offsets);
  std::ranges::sort(offsets);
  std::int64_t end = 0;
  for (const auto& part : offsets) {
    if (part[0] != end) return false;
    end = part[1];
  }
  return end == static_cast<std::int64_t>(data_size);
}

}  // namespace

std::vector<float> SafeTensor::floats(std::span<const std::int64_t> expected, const std::string& what) const {
  if (dtype != "F32" || !std::ranges::equal(shape, expected)) {
    throw TensorError(what + " has the wrong dtype or shape");
  }
  std::vector<float> values(bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
    throw TensorError(what + " holds NaN or infinity");
  }
  return values;
}

SafeTensors parse_safetensors(std::string_view content, const std::string& where) {
  std::uint64_t header_size = 0;
  if (content.size() >= sizeof header_size) std::memcpy(&header_size, content.data(), sizeof header_size);
  if (content.size() < sizeof header_size || header_size > content.size() - sizeof header_size) {
    throw TensorError(where + ": its header is longer than the file");
  }
  Header header = read_header(content.substr(sizeof header_size, header_size), where);
  const std::string_view data = content.substr(sizeof header_size + header_size);
  SafeTensors found;
  for (auto& [name, entry] : header.entries) {
    if (!fits(entry, data.size())) {
      throw TensorError(where + ": " + name + " has offsets that do not fit its dtype, its shape or the file");
    }
    const auto begin = static_cast<std::size_t>(entry.data_offsets[0]);
    const auto end = static_cast<std::size_t>(entry.data_offsets[1]);
    found.tensors[name] = {entry.dtype, entry.shape, data.substr(begin, end - begin)};
  }
  if (!cover(header.entries, data.size())) throw TensorError(where + ": its tensors do not cover the file");
  found.metadata = std::move(header.metadata);
  return found;
}

std::map<std::string, std::vector<float>> read_safetensors(
    std::string_view content, const std::string& where,
    const std::map<std::string, std::vector<std::int64_t>>& shapes) {
  const SafeTensors file = parse_safetensors(content, where);
  std::map<std::string, std::vector<float>> tensors;
  for (const auto& [name, tensor] : file.tensors) {
    if (!shapes.contains(name)) throw TensorError(where + ": holds an unexpected tensor " + name);
    tensors[name] = tensor.floats(shapes.at(name), where + ": " + name);
  }
  if (tensors.size() != shapes.size()) throw TensorError(where + ": a tensor is missing");
  return tensors;
}

}  // namespace chameleon
