// The signatures that the Python tests check too.

#include <gtest/gtest.h>

#include <fstream>

#include "shared_data.h"

namespace chameleon::test::provenance_test {

class Signatures : public testing::TestWithParam<Json> {};

TEST_P(Signatures, AreAcceptedOrRefusedWithTheirCode) {
  const Json& given = GetParam();
  const HostileBundle bundle(given), keys(given);  // the second is a directory for the keys
  if (!given.at("signature").is_null()) {
    std::ofstream(bundle.path() / "bundle.json.sig", std::ios::binary)
        << from_base64(given.at("signature").get<std::string>());
  }
  const Json data = read_data("signatures.json");
  for (const Json& key : data.at("keys")) {
    std::ofstream(keys.path() / key.at("name").get<std::string>()) << key.at("pem").get<std::string>();
  }
  LoadOptions options;
  if (!given.at("trusted").is_null()) {
    options.trusted_keys.emplace();
    for (const Json& name : given.at("trusted")) options.trusted_keys->push_back(keys.path() / name.get<std::string>());
  }
  std::string code;
  try {
    const Runtime runtime(bundle.path(), options);
  } catch (const Error& error) {
    code = error.code();
  }
  EXPECT_EQ(code, given.at("code").is_null() ? "" : given.at("code").get<std::string>());
}

INSTANTIATE_TEST_SUITE_P(Corpus, Signatures,
                         testing::ValuesIn(read_data("signatures.json").at("cases").get<std::vector<Json>>()),
                         [](const auto& info) { return info.param.at("name").template get<std::string>(); });

}  // namespace chameleon::test::provenance_test
