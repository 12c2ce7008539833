#include "device/engines.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

#include "chameleon/error.h"
#include "contract/json_fields.h"
#include "contract/mapped_file.h"

namespace chameleon {

namespace fs = std::filesystem;

namespace {

using Key = std::map<std::string, std::string>;

/// $CHAMELEON_DEPLOY_CACHE, else $XDG_CACHE_HOME/chameleon-deploy, else ~/.cache/chameleon-deploy, as in Python.
fs::path cache_root() {
  const auto variable = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value != nullptr ? value : "";
  };
  if (const std::string chosen = variable("CHAMELEON_DEPLOY_CACHE"); !chosen.empty()) return chosen;
  const std::string cache = variable("XDG_CACHE_HOME");
  return (cache.empty() ? fs::path(variable("HOME")) / ".cache" : fs::path(cache)) / "chameleon-deploy";
}

/// Throw PathError unless the directory is missing, or is this user's (or root's) and writable by nobody else.
void require_private(const fs::path& directory) {
  struct stat found{};
  if (::lstat(directory.c_str(), &found) != 0) return;
  const char* fault = nullptr;
  if (S_ISLNK(found.st_mode)) {
    fault = "is a symbolic link";
  } else if (found.st_uid != ::geteuid() && found.st_uid != 0) {
    fault = "belongs to another user";
  } else if ((found.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    fault = "can be written by others: run chmod go-w on it";
  }
  if (fault != nullptr) {
    throw PathError("unsafe local cache: " + directory.string() + " " + fault +
                    "; set CHAMELEON_DEPLOY_CACHE to a private directory");
  }
}

/// The key of a cache entry if every file has the recorded size and digest, else an empty key.
Key intact_key(const fs::path& path) {
  require_private(path);
  Key key;
  std::map<std::string, FileSpec> files;
  Fields(Json::parse(MappedFile(path / "entry.json").text()), path.string())
      .required("key", key)
      .required("files", files)
      .finish();
  for (const auto& [name, spec] : files) {
    if (!fs::is_regular_file(fs::symlink_status(path / name))) return {};
    const MappedFile file(path / name);
    if (static_cast<std::int64_t>(file.bytes().size()) != spec.size || sha256(file.bytes()) != spec.sha256) return {};
  }
  for (const fs::directory_entry& file : fs::directory_iterator(path)) {
    const std::string name = file.path().filename().string();
    if (name != "entry.json" && !files.contains(name)) return {};
  }
  return key;
}

}  // namespace

fs::path find_engines(const Bundle& bundle, const EngineTarget& target) {
  const Key expected = {{"bundle", bundle.digest}, {"builder", target.builder},
                        {"device", target.device}, {"compute_capability", target.compute_capability},
                        {"driver", target.driver}, {"precision", bundle.manifest.precision}};
  const fs::path engines = cache_root() / "engines";
  std::error_code missing;
  require_private(fs::canonical(cache_root(), missing));  // a link to the cache itself belongs to the user
  require_private(engines);
  for (const fs::directory_entry& entry : fs::directory_iterator(engines, missing)) {
    if (!fs::is_regular_file(entry.path() / "entry.json")) continue;
    Key key;
    try {
      key = intact_key(entry.path());
    } catch (const std::exception&) {
      continue;  // a damaged entry is treated as missing
    }
    // The key also has the optimization profiles, which follow from the bundle.
    std::erase_if(key, [](const auto& field) { return field.first.starts_with("profiles."); });
    if (key == expected) return entry.path();
  }
  throw ProviderError("no TensorRT engines for " + bundle.path.string() + " on " + target.device + " with " +
                      target.builder + ": build them with `python -m chameleon_deploy.export " + bundle.path.string() +
                      " --target tensorrt`");
}

}  // namespace chameleon
