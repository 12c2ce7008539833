#include "inputs.h"

#include "chameleon/error.h"
#include "contract/mapped_file.h"

namespace chameleon {

namespace {

void check_row(std::size_t row, const TokenIds& ids, const ModelSpec& model) {
  const std::string text = "text " + std::to_string(row);
  if (ids.empty()) throw InputError(text + " is empty: every text needs at least one token");
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= model.vocab_size) {
      throw TokenError(text + ": token id " + std::to_string(id) + " is outside the vocabulary of " +
                       std::to_string(model.vocab_size));
    }
  }
  if (static_cast<std::int64_t>(ids.size()) > model.max_positions) {
    throw LengthError(text + " has " + std::to_string(ids.size()) + " tokens, the model has " +
                      std::to_string(model.max_positions) + " positions");
  }
}

}  // namespace

Tokenizer load_tokenizer(const std::filesystem::path& file) {
  try {
    return Tokenizer(MappedFile(file).text());
  } catch (const ManifestError& error) {
    throw ManifestError(file.string() + ": " + error.what());
  }
}

std::vector<TokenIds> encode(const Texts& texts, const Tokenizer& tokenizer, const ModelSpec& model) {
  std::vector<TokenIds> rows;
  if (const auto* strings = std::get_if<std::span<const std::string>>(&texts)) {
    for (const std::string& text : *strings) {
      try {
        rows.push_back(tokenizer.encode(text));
      } catch (const InputError& error) {
        throw InputError("text " + std::to_string(rows.size()) + ": " + error.what());
      }
    }
  } else {
    const auto given = std::get<std::span<const TokenIds>>(texts);
    rows.assign(given.begin(), given.end());
  }
  if (rows.empty()) throw InputError("the batch is empty: pass at least one text");
  for (std::size_t row = 0; row < rows.size(); ++row) check_row(row, rows[row], model);
  return rows;
}

}  // namespace chameleon
