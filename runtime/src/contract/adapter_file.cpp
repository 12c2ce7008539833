#include "contract/adapter_file.h"

#include <algorithm>

#include "chameleon/error.h"
#include "contract/json_fields.h"
#include "contract/mapped_file.h"
#include "contract/safetensors.h"
#include "factors.h"

namespace chameleon {

namespace fs = std::filesystem;

namespace {

/// The factor tensors that a file has to hold, with their widths. Throws AdapterError.
std::map<std::string, std::int64_t> check_metadata(const std::map<std::string, std::string>& metadata,
                                                   const AdaptationSpec& spec, const std::string& where) {
  const auto value = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  if (value("format") != "chameleon-adapter" || value("format_version") != "1") {
    throw AdapterError(where + ": not an adapter file of version 1: export the adapter again");
  }
  if (spec.base_digest.empty()) {
    throw AdapterError(where + ": this bundle takes no adapters: export its base model, with --adaptable LAYERS");
  }
  if (value("base_digest") != spec.base_digest) {
    throw AdapterError(where + ": it is for another base model than this bundle's: export it for this bundle");
  }
  const Json targets = Json::parse(value("targets"), nullptr, false);
  if (!targets.is_array() || targets.empty()) throw AdapterError(where + ": its metadata name no targets");
  AdaptationSpec adapted;
  for (const Json& name : targets) {
    const auto known = std::ranges::find_if(spec.targets, [&](const TargetSpec& each) { return name == each.name; });
    if (known == spec.targets.end()) {
      throw AdapterError(where + ": adapts " + name.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 80) +
                         ", which this bundle does not: export it with --adaptable LAYERS or with this adapter");
    }
    adapted.targets.push_back(*known);
  }
  return adapted.factor_widths();
}

/// The invocation tokens that the metadata name, or none. Throws AdapterError.
std::vector<std::int64_t> invocation_tokens(const std::map<std::string, std::string>& metadata, std::int64_t vocab_size,
                                            const std::string& where) {
  const auto found = metadata.find("invocation_tokens");
  if (found == metadata.end()) return {};
  const Json json = Json::parse(found->second, nullptr, false);
  if (!json.is_array() || json.empty() || json.size() > kMaxInvocationTokens) {
    throw AdapterError(where + ": its invocation_tokens must be a list of 1 to " +
                       std::to_string(kMaxInvocationTokens) + " token ids");
  }
  std::vector<std::int64_t> tokens;
  for (const Json& token : json) {
    const bool is_token =
        token.is_number_unsigned() && token.get<std::uint64_t>() < static_cast<std::uint64_t>(vocab_size);
    if (!is_token) {
      throw AdapterError(where + ": its invocation_tokens hold " + token.dump().substr(0, 40) + ": this bundle has " +
                         std::to_string(vocab_size) + " tokens");
    }
    tokens.push_back(token.get<std::int64_t>());
  }
  return tokens;
}

/// The rank of all tensors. Throws TensorError unless they are those of `widths`.
std::int64_t check_tensors(const std::map<std::string, SafeTensor>& tensors,
                           const std::map<std::string, std::int64_t>& widths, const AdaptationSpec& spec,
                           const std::string& where) {
  if (!std::ranges::equal(
          tensors, widths, {}, [](const auto& tensor) { return tensor.first; },
          [](const auto& width) { return width.first; })) {
    throw TensorError(where + ": its tensors and its targets differ");
  }
  const std::vector<std::int64_t>& first = tensors.begin()->second.shape;
  const std::int64_t rank = first.empty() ? 0 : first[0];
  check_rank(where, rank, spec);
  return rank;
}

SafeTensors parse(const MappedFile& file, const std::string& where) try {
  return parse_safetensors(file.text(), where);
} catch (const TensorError& error) {
  throw AdapterError(std::string("not an adapter file: ") + error.what());
}

MappedFile map(const fs::path& file) try {
  std::error_code problem;
  if (fs::symlink_status(file, problem).type() != fs::file_type::regular) {
    throw AdapterError(file.string() + " is not a plain file: pass a file that export wrote");
  }
  return MappedFile(file);
} catch (const MissingFileError& error) {
  throw AdapterError(error.what());
}

}  // namespace

std::int64_t max_rank(const AdaptationSpec& spec) { return spec.regime == "base" ? spec.rank : kMaxRank; }

void check_rank(const std::string& where, std::int64_t rank, const AdaptationSpec& spec) {
  if (rank < 1 || rank > kMaxRank) {
    throw TensorError(where + ": rank " + std::to_string(rank) + ": it must be from 1 to " + std::to_string(kMaxRank));
  }
  if (rank > max_rank(spec)) {
    throw TensorError(where + ": rank " + std::to_string(rank) + ": this bundle was exported with --max-rank " +
                      std::to_string(spec.rank));
  }
}

StoredAdapter read_adapter(const fs::path& file, const AdaptationSpec& spec, std::int64_t vocab_size) {
  const std::string where = file.string();
  const MappedFile mapped = map(file);
  const SafeTensors parsed = parse(mapped, where);
  const auto widths = check_metadata(parsed.metadata, spec, where);
  std::vector<std::int64_t> activated_by = invocation_tokens(parsed.metadata, vocab_size, where);
  const std::int64_t rank = check_tensors(parsed.tensors, widths, spec, where);
  std::map<std::string, std::vector<float>> tensors;
  for (const auto& [name, width] : spec.factor_widths()) {
    const std::int64_t shape[] = {rank, width};
    if (widths.contains(name)) {
      tensors[name] = parsed.tensors.at(name).floats(shape, where + ": " + name);
    } else {
      tensors[name].resize(static_cast<std::size_t>(rank * width));
    }
  }
  return {make_factor_sets(1, rank, std::move(tensors)), std::move(activated_by), sha256(mapped.bytes())};
}

}  // namespace chameleon
