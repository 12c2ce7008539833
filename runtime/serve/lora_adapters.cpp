#include "lora_adapters.h"

#include <algorithm>
#include <cctype>

namespace chameleon::serve {

namespace {

const std::filesystem::path& directory_of(const Served& served) {
  if (!served.adapter_files) {
    throw ApiError(403, "adapters_fixed", "this server loads no adapters: start it with --adapters DIR");
  }
  return *served.adapter_files;
}

/// So that a request reads no other file of this machine.
bool is_plain_name(std::string_view path) {
  const auto is_plain = [](unsigned char c) { return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-'; };
  return !path.empty() && path.front() != '.' && std::ranges::all_of(path, is_plain);
}

}  // namespace

Json load(const LoadAdapterRequest& request, Served& served) {
  const std::filesystem::path& directory = directory_of(served);
  if (!is_plain_name(request.lora_path)) {
    throw ApiError(400, "path_unsafe", "lora_path must be the plain name of a file in --adapters", "lora_path");
  }
  served.runtime.load_adapter(request.lora_name, directory / request.lora_path);
  return served.models.get(served.models.name() + ":" + request.lora_name);
}

Json unload(const UnloadAdapterRequest& request, Served& served) {
  (void)directory_of(served);
  served.runtime.unload_adapter(request.lora_name);
  return {{"lora_name", request.lora_name}};
}

}  // namespace chameleon::serve
