#include "chameleon/bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "chameleon/error.h"
#include "contract/basis.h"
#include "contract/mapped_file.h"
#include "contract/onnx_operators.h"
#include "contract/opening.h"
#include "contract/provenance.h"
#include "contract/safetensors.h"
#include "factors.h"

namespace chameleon {

namespace fs = std::filesystem;

namespace {

constexpr const char* kManifest = "bundle.json";

void check_listing(const fs::path& path, const Manifest& manifest) {
  std::vector<fs::path> entries;
  for (const fs::directory_entry& entry : fs::directory_iterator(path)) entries.push_back(entry.path());
  std::ranges::sort(entries);  // so that every machine reports the same fault first
  for (const fs::path& entry : entries) {
    if (fs::is_symlink(entry)) {
      throw PathError(entry.string() + " is a symbolic link: a bundle holds plain files only; copy the file itself");
    }
    const std::string name = entry.filename().string();
    if (name == kSignature && fs::is_regular_file(entry)) continue;  // it cannot be listed in what it signs
    if (name != kManifest && !manifest.files.contains(name)) {
      throw UnknownFileError(entry.string() + " is not listed in bundle.json: remove it or export again");
    }
  }
  for (const auto& [name, spec] : manifest.files) {
    if (!fs::is_regular_file(path / name)) {
      throw MissingFileError((path / name).string() + " is listed in bundle.json but missing: copy the bundle again");
    }
  }
}

FileStamp stamp_of(const fs::path& file) {
  struct stat status{};
  if (::stat(file.c_str(), &status) != 0) {
    throw BundleChangedError(file.string() + ": " + std::strerror(errno) + ": load the bundle again");
  }
  return chameleon::stamp_of(status);
}

void check_size(const fs::path& file, const FileSpec& spec) {
  if (const auto size = static_cast<std::int64_t>(fs::file_size(file)); size != spec.size) {
    throw DigestError(file.string() + ": " + std::to_string(size) + " bytes, bundle.json says " +
                      std::to_string(spec.size) + ": copy the bundle again");
  }
}

void check_digest(const fs::path& file, const FileSpec& spec) {
  // Unmapped after hashing: the pages stay in the page cache for ONNX Runtime's own mapping and are counted once.
  if (sha256(MappedFile(file).bytes()) != spec.sha256) {
    throw DigestError(file.string() + ": its SHA-256 differs from bundle.json: copy the bundle again");
  }
}

void check_graph_files(const fs::path& path, const Manifest& manifest) {
  std::map<std::string, std::int64_t> sizes;
  for (const auto& [name, spec] : manifest.files) sizes[name] = spec.size;
  for (const auto& [name, graph] : manifest.graphs) {
    const fs::path file = path / graph.file;
    check_model(MappedFile(file).bytes(), sizes, file.string());
  }
}

std::vector<float> read_centroids(const fs::path& path, const Manifest& manifest) {
  if (manifest.adaptation.num_clusters == 0) return {};
  const fs::path file = path / "centroids.safetensors";
  const std::vector shape = {manifest.adaptation.num_clusters, manifest.model.hidden_size};
  return read_safetensors(MappedFile(file).text(), file.string(), {{"centroids", shape}}).at("centroids");
}

FactorSets read_lora(const fs::path& path, const Manifest& manifest) {
  const fs::path file = path / "lora.safetensors";
  const std::int64_t rank = manifest.adaptation.rank;
  const std::int64_t count = std::max<std::int64_t>(1, std::ssize(manifest.adaptation.adapters));
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const auto& [name, width] : manifest.adaptation.factor_widths()) shapes[name] = {count, rank, width};
  return make_factor_sets(count, rank, read_safetensors(MappedFile(file).text(), file.string(), shapes));
}

/// Check and read every file that the manifest lists. Returns the check of the weights' digest, which is not over yet.
std::shared_future<void> read_files(Bundle& bundle) {
  const fs::path& path = bundle.path;
  const std::map<std::string, FileSpec>& files = bundle.manifest.files;
  check_listing(path, bundle.manifest);
  for (const auto& [name, spec] : files) check_size(path / name, spec);
  const StoredTensor& stored = bundle.manifest.token_embedding;
  bundle.stamps[stored.file] = stamp_of(path / stored.file);
  for (const auto& [name, spec] : files) {
    if (name != stored.file) check_digest(path / name, spec);
  }
  check_graph_files(path, bundle.manifest);
  std::shared_future<void> weights_checked =
      std::async(std::launch::async, check_digest, path / stored.file, files.at(stored.file));
  bundle.centroids = read_centroids(path, bundle.manifest);
  if (bundle.manifest.adaptation.regime == "lora") bundle.lora = read_lora(path, bundle.manifest);
  if (bundle.manifest.has_basis()) {
    const fs::path file = path / "basis.safetensors";
    bundle.basis = read_basis(MappedFile(file).text(), file.string(), bundle.manifest.adaptation);
  }
  const auto weights = std::make_shared<const MappedFile>(path / stored.file);
  const auto from = [&](std::int64_t offset) { return weights->bytes().subspan(static_cast<std::size_t>(offset)); };
  bundle.embedding = from(stored.offset);
  if (stored.row_scales_offset) bundle.row_scales = from(*stored.row_scales_offset);
  if (stored.channel_scales_offset) bundle.channel_scales = from(*stored.channel_scales_offset);
  bundle.mapping = weights;
  return weights_checked;
}

}  // namespace

const GraphSpec& Bundle::graph(std::string_view role, std::string_view provider) const {
  const GraphSpec* best = nullptr;
  for (const auto& [name, graph] : manifest.graphs) {
    const bool fits = graph.role == role && std::ranges::find(graph.providers, provider) != graph.providers.end();
    if (fits && (best == nullptr || graph.providers.size() < best->providers.size())) best = &graph;
  }
  if (best == nullptr) {
    throw ManifestError((path / kManifest).string() + ": no " + std::string(role) + " graph for provider '" +
                        std::string(provider) + "'");
  }
  return *best;
}

void Bundle::check_unchanged() const {
  for (const auto& [name, stamp] : stamps) {
    const FileStamp found = stamp_of(path / name);
    if (found == stamp) continue;
    const bool same_file = found.device == stamp.device && found.inode == stamp.inode;
    throw BundleChangedError((path / name).string() + " was " +
                             (same_file ? "changed in place: results may be wrong" : "replaced") +
                             ": load the bundle again");
  }
}

Bundle open_bundle(const fs::path& path, const TrustedKeys& trusted_keys) {
  OpeningBundle opening = start_opening(path, trusted_keys);
  opening.require_weights();
  return std::move(opening.bundle);
}

OpeningBundle start_opening(const fs::path& path, const TrustedKeys& trusted_keys) try {
  if (!fs::is_directory(path)) {
    throw BundleNotFoundError(path.string() + " is not a directory: pass the directory that export wrote");
  }
  if (!fs::is_regular_file(path / kManifest)) {
    throw BundleNotFoundError(path.string() + " has no bundle.json: it is not a bundle");
  }
  Bundle bundle;
  bundle.stamps[kManifest] = stamp_of(path / kManifest);  // before it is read, so that a later change is noticed
  const MappedFile raw(path / kManifest);
  // Checked first: what no trusted key signed is not even parsed.
  if (trusted_keys) check_signature(raw.bytes(), path / kSignature, *trusted_keys);
  bundle.path = path;
  bundle.manifest = parse_manifest(raw.text(), path / kManifest);
  bundle.digest = sha256(raw.bytes());
  std::shared_future<void> weights_checked = read_files(bundle);
  return {std::move(bundle), std::move(weights_checked)};
} catch (const fs::filesystem_error& error) {
  throw BundleNotFoundError("cannot read " + path.string() + ": " + error.code().message());
}

}  // namespace chameleon
