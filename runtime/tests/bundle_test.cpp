// Loading the good and hostile bundles that the Python tests load too.

#include <gtest/gtest.h>

#include "shared_data.h"

namespace chameleon::test::bundle_test {

class HostileBundles : public testing::TestWithParam<Json> {};

TEST_P(HostileBundles, IsRefusedWithItsCode) {
  const HostileBundle bundle(GetParam());
  try {
    const Runtime runtime(bundle.path());
    FAIL() << "it opened";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), GetParam().at("code").get<std::string>()) << error.what();
    EXPECT_FALSE(std::string(error.what()).empty());
  }
}

INSTANTIATE_TEST_SUITE_P(Corpus, HostileBundles, testing::ValuesIn(read_data("hostile.json").get<std::vector<Json>>()),
                         [](const auto& info) {
                           std::string name = info.param.at("name");
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

TEST(Bundle, ADirectoryThatIsNotThere) {
  EXPECT_THROW(open_bundle("/nowhere"), BundleNotFoundError);
  EXPECT_THROW(open_bundle("/etc/hostname"), BundleNotFoundError);
}

TEST(Bundle, ManifestIsRead) {
  const Bundle bundle = open_bundle(good_bundle("chameleon_masked"));
  EXPECT_EQ(bundle.manifest.model.vocab_size, 320);
  EXPECT_EQ(bundle.manifest.model.num_layers, 2);
  EXPECT_EQ(bundle.manifest.adaptation.alpha, 0.5);
  EXPECT_EQ(available_modes(bundle.manifest.adaptation).size(), 6U);
  EXPECT_EQ(bundle.manifest.graphs.at("decoder").inputs.size(), 11U);
  EXPECT_EQ(bundle.centroids.size(), 3U * 16U);
  EXPECT_EQ(bundle.digest.size(), 64U);
  EXPECT_EQ(bundle.lora.count, 0);
  EXPECT_EQ(open_bundle(good_bundle("lora_masked")).lora.tensors.at("lm_head.lora_B").size(), 2U * 320U);
}

TEST(Bundle, AFileThatChangesIsSeen) {
  const HostileBundle copy({{"base", "lora_masked"}, {"changes", Json::array()}});
  const Runtime runtime(copy.path());
  EXPECT_NO_THROW(runtime.bundle().check_unchanged());
  std::filesystem::resize_file(copy.path() / "weights.bin", 100);
  EXPECT_THROW(runtime.bundle().check_unchanged(), BundleChangedError);
}

TEST(Bundle, TheGraphForFewerProvidersWins) {
  Bundle bundle = open_bundle(good_bundle("lora_masked"));
  bundle.manifest.graphs.erase("decoder_cpu");
  GraphSpec special = bundle.manifest.graphs.at("decoder");
  special.providers = {"cpu"};
  special.file = "special.onnx";
  bundle.manifest.graphs["a"] = special;
  EXPECT_EQ(bundle.graph("decoder", "cpu").file, "special.onnx");
  EXPECT_EQ(bundle.graph("decoder", "cuda").file, "decoder.onnx");
  EXPECT_THROW((void)bundle.graph("decoder", "rocm"), ManifestError);
}

TEST(Bundle, DamagedWeightsAreReportedBeforeWhatTheyExplain) {
  const HostileBundle damaged(
      {{"base", "lora_masked"}, {"changes", {{{"do", "flip"}, {"file", "weights.bin"}, {"offset", 100}}}}});
  EXPECT_THROW(open_bundle(damaged.path()), DigestError);
  EXPECT_THROW(Runtime{damaged.path()}, DigestError);
  EXPECT_THROW(Runtime(damaged.path(), {.mode = Mode::cohort}), DigestError);  // of an intact bundle: a ModeError
}

TEST(Runtime, UnavailableModesAndProviders) {
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.mode = Mode::cohort}), ModeError);
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.provider = "cuda"}), ProviderError);
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.threads = 0}), InputError);
  EXPECT_THROW(parse_mode("nonsense"), ModeError);
  EXPECT_NO_THROW(Runtime(good_bundle("lora_masked"), {.provider = "auto", .threads = 1}));
}

}  // namespace chameleon::test::bundle_test
