// Convert callers' texts to token ids, with every check in one place.
#pragma once

#include "chameleon/runtime.h"

namespace chameleon {

/// The tokenizer of a file of a bundle. Throws ManifestError, which names the file.
Tokenizer load_tokenizer(const std::filesystem::path& file);

/// The token ids of texts, or the passed ids after the same checks.
/// model: whose vocabulary and positions they must keep to
/// Throws InputError (nothing given, empty text, not encodable), TokenError or LengthError.
std::vector<TokenIds> encode(const Texts& texts, const Tokenizer& tokenizer, const ModelSpec& model);

}  // namespace chameleon
