// The checks of the local cache before an engine is read.
#include "device/engines.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "chameleon/error.h"
#include "contract/mapped_file.h"
#include "shared_data.h"

namespace chameleon::test::engines_test {
namespace {

namespace fs = std::filesystem;

class Engines : public ::testing::Test {
 protected:
  Engines() {
    ::setenv("CHAMELEON_DEPLOY_CACHE", cache_.c_str(), 1);
    fs::create_directories(entry_);
    write("decoder.engine", "an engine");
    const Json file = {{"size", 9}, {"sha256", sha256(MappedFile(entry_ / "decoder.engine").bytes())}};
    content_ = {{"key",
                 {{"bundle", bundle_.digest},
                  {"builder", target_.builder},
                  {"device", target_.device},
                  {"compute_capability", target_.compute_capability},
                  {"driver", target_.driver},
                  {"precision", "fp32"},
                  {"profiles.decoder", "prefill: batch 1..8..32"}}},
                {"files", {{"decoder.engine", file}}}};
    write_entry();
  }
  ~Engines() override {
    ::unsetenv("CHAMELEON_DEPLOY_CACHE");
    fs::remove_all(cache_);
  }
  void write(const std::string& name, const std::string& content) { std::ofstream(entry_ / name) << content; }
  void write_entry() { write("entry.json", content_.dump()); }
  void expect_refused(const std::function<void()>& change) {
    EXPECT_EQ(find_engines(bundle_, target_), entry_);
    change();
    EXPECT_THROW((void)find_engines(bundle_, target_), ProviderError);
  }

  using Json = nlohmann::json;
  const EngineTarget target_{"tensorrt 11.1.0.106", "a GPU", "9.0", "13.0"};
  const Bundle bundle_ = open_bundle(good_bundle("chameleon_masked"));
  const fs::path cache_ = fs::temp_directory_path() / ("chameleon_engines_" + std::to_string(::getpid()));
  const fs::path entry_ = cache_ / "engines" / "0123456789abcdef";
  Json content_;
};

TEST_F(Engines, OfAnotherKeyAreRefused) {
  for (const char* field : {"bundle", "builder", "device", "compute_capability", "driver", "precision"}) {
    const Json before = content_;
    expect_refused([&] {
      content_["key"][field] = "another";
      write_entry();
    });
    content_ = before;
    write_entry();
  }
  expect_refused([&] {
    content_["key"]["more"] = "than is known";
    write_entry();
  });
}

TEST_F(Engines, TamperedWithAreRefused) {
  expect_refused([&] { write("decoder.engine", "An engine"); });
}
TEST_F(Engines, CutOffAreRefused) {
  expect_refused([&] { write("decoder.engine", "an eng"); });
}
TEST_F(Engines, MissingAreRefused) {
  expect_refused([&] { fs::remove(entry_ / "decoder.engine"); });
}
TEST_F(Engines, WithUnknownFilesAreRefused) {
  expect_refused([&] { write("more", ""); });
}
TEST_F(Engines, BehindALinkAreRefused) {
  expect_refused([&] {
    fs::rename(entry_ / "decoder.engine", cache_ / "elsewhere");
    fs::create_symlink(cache_ / "elsewhere", entry_ / "decoder.engine");
  });
}
TEST_F(Engines, WithoutJsonAreRefused) {
  expect_refused([&] { write("entry.json", "{"); });
}
TEST_F(Engines, ThatOthersCanReplaceAreRefused) {
  expect_refused([&] { fs::permissions(entry_, fs::perms::group_write, fs::perm_options::add); });
}
TEST_F(Engines, OfACacheThatOthersCanWriteToAreRefused) {
  for (const fs::path& directory : {cache_, cache_ / "engines"}) {
    fs::permissions(directory, fs::perms::others_write, fs::perm_options::add);
    EXPECT_THROW((void)find_engines(bundle_, target_), PathError) << directory;
    fs::permissions(directory, fs::perms::others_write, fs::perm_options::remove);
    EXPECT_EQ(find_engines(bundle_, target_), entry_);
  }
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  ASSERT_EQ(::chown(cache_.c_str(), 65534, 65534), 0);
  EXPECT_THROW((void)find_engines(bundle_, target_), PathError);
}
TEST_F(Engines, BehindALinkOfTheirKindAreRefused) {
  fs::rename(cache_ / "engines", cache_ / "elsewhere");
  fs::create_directory_symlink(cache_ / "elsewhere", cache_ / "engines");
  EXPECT_THROW((void)find_engines(bundle_, target_), PathError);
}
TEST_F(Engines, OfNoCacheAreRefused) {
  expect_refused([&] { fs::remove_all(cache_); });
}

}  // namespace
}  // namespace chameleon::test::engines_test
