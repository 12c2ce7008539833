// Loading: the corpus of good and hostile bundles that Python is tested with too.

#include <gtest/gtest.h>

#include "shared_data.h"

namespace chameleon::test {

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

/// The code that loading gives when one field of bundle.json has another value.
std::string code_with(const std::vector<std::string>& path, const Json& value) {
  const Json change = {{"do", "set"}, {"path", path}, {"value", value}};
  const HostileBundle bundle({{"base", "chameleon_masked"}, {"changes", {change}}});
  try {
    const Runtime runtime(bundle.path());
    return "it opened";
  } catch (const Error& error) {
    return error.code();
  }
}

TEST(Manifest, IsHeldAgainstTheGraphs) {
  const Json decoder = read_json(good_bundle("chameleon_masked") / "bundle.json").at("graphs").at("decoder");
  const Json target = {{"name", "lm_head"}, {"in_features", 16}, {"out_features", 320}};
  const Json other_width = {{"name", "lm_head"}, {"in_features", 17}, {"out_features", 320}};
  const Json other_layer = {{"name", "transformer.h.0.attn.c_attn"}, {"in_features", 16}, {"out_features", 48}};
  const std::vector<std::pair<std::vector<std::string>, Json>> cases = {
      {{"model", "num_layers"}, 1},
      {{"model", "num_layers"}, 3},
      {{"model", "num_layers"}, 2000000000},
      {{"model", "num_layers"}, 9223372036854775808U},
      {{"model", "num_layers"}, 1e30},
      {{"model", "num_attention_heads"}, 3},
      {{"model", "num_key_value_heads"}, 1},
      {{"model", "head_dim"}, 4},
      {{"model", "max_positions"}, 2147483648},
      {{"adaptation", "rank"}, 8},
      {{"adaptation", "targets"}, Json::array()},
      {{"adaptation", "targets"}, {target, target}},
      {{"adaptation", "targets"}, {target, other_layer}},
      {{"adaptation", "targets"}, {other_layer}},
      {{"adaptation", "targets"}, {other_width}},
      {{"precision"}, "int8"},
      {{"precision"}, "fp16"},
      {{"graphs", "decoder", "cache"}, "shared"},
      {{"graphs", "decoder_cpu", "cache"}, "growing"},
      {{"graphs", "decoder", "role"}, "chooser"},
      {{"graphs", "chooser", "role"}, "logits_scorer"},
      {{"graphs", "chooser", "inputs", "0", "shape"}, {"batch", "positions", 319}},
      {{"graphs", "logits_scorer", "outputs", "0", "dtype"}, "int64"},
      {{"graphs", "hidden_scorer", "inputs", "0", "shape"}, {"positions", 8}},
      {{"graphs", "hypernetwork", "outputs", "0", "shape"}, {"factor_sets", "rank", 16}},
      {{"graphs", "decoder", "inputs", "0"}, decoder.at("inputs").at(1)},  // one name twice
  };
  for (const auto& [path, value] : cases) EXPECT_EQ(code_with(path, value), "manifest_invalid") << path.back() << value;
  EXPECT_EQ(code_with({"model", "num_attention_heads"}, 2), "it opened");
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

TEST(Runtime, UnavailableModesAndProviders) {
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.mode = Mode::cohort}), ModeError);
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.provider = "cuda"}), ProviderError);
  EXPECT_THROW(Runtime(good_bundle("lora_masked"), {.threads = 0}), InputError);
  EXPECT_THROW(parse_mode("nonsense"), ModeError);
  EXPECT_NO_THROW(Runtime(good_bundle("lora_masked"), {.provider = "auto", .threads = 1}));
}

}  // namespace chameleon::test
