#include "safetensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "chameleon/error.h"
#include "json_fields.h"

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

std::map<std::string, Entry> read_header(std::string_view header, const std::string& where) {
  std::map<std::string, Entry> entries;
  Json json = Json::parse(header);
  if (json.is_object()) json.erase("__metadata__");
  chameleon::read(json, where, entries);
  return entries;
}

std::vector<float> read_floats(const Entry& entry, const std::vector<std::int64_t>& shape, std::string_view data,
                               const std::string& what) {
  if (entry.dtype != "F32" || entry.shape != shape) throw TensorError(what + " has the wrong dtype or shape");
  std::int64_t size = sizeof(float);
  bool overflows = false;
  for (const std::int64_t dimension : shape) overflows |= __builtin_mul_overflow(size, dimension, &size);
  const auto& offsets = entry.data_offsets;
  if (overflows || offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] ||
      offsets[1] > static_cast<std::int64_t>(data.size()) || offsets[1] - offsets[0] != size) {
    throw TensorError(what + " has offsets that do not fit its shape or the file");
  }
  std::vector<float> values(static_cast<std::size_t>(size) / sizeof(float));
  std::memcpy(values.data(), data.data() + offsets[0], values.size() * sizeof(float));
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); })) {
    throw TensorError(what + " holds NaN or infinity");
  }
  return values;
}

}  // namespace

std::map<std::string, std::vector<float>> read_safetensors(
    std::string_view content, const std::string& where,
    const std::map<std::string, std::vector<std::int64_t>>& shapes) {
  std::uint64_t header_size = 0;
  if (content.size() >= sizeof header_size) std::memcpy(&header_size, content.data(), sizeof header_size);
  if (content.size() < sizeof header_size || header_size > content.size() - sizeof header_size) {
    throw TensorError(where + ": its header is longer than the file");
  }
  std::map<std::string, Entry> entries;
  try {
    entries = read_header(content.substr(sizeof header_size, header_size), where);
  } catch (const Json::exception& error) {
    throw TensorError(where + ": " + error.what());
  } catch (const ManifestError& error) {  // json_fields.h throws it; here a tensor is at fault
    throw TensorError(error.what());
  }
  const std::string_view data = content.substr(sizeof header_size + header_size);
  std::map<std::string, std::vector<float>> tensors;
  std::size_t used = 0;
  for (const auto& [name, entry] : entries) {
    if (!shapes.contains(name)) throw TensorError(where + ": holds an unexpected tensor " + name);
    tensors[name] = read_floats(entry, shapes.at(name), data, where + ": " + name);
    used += tensors[name].size() * sizeof(float);
  }
  if (tensors.size() != shapes.size()) throw TensorError(where + ": a tensor is missing");
  if (used != data.size()) throw TensorError(where + ": its tensors do not cover the file");
  return tensors;
}

}  // namespace chameleon
