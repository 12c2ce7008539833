#pragma once

#include <optional>
#include <string>
#include <vector>

#include "echo.h"
#include "job.h"
#include "logprobs.h"

namespace chameleon::serve {

/// Writes the choices of one row: whole, or piece by piece.
class RowWriter {
 public:
  /// echo: of the row's prompt, which is written first; nullptr for none. It and the job must outlive this
  RowWriter(const Job& job, std::size_t row, const Echo* echo);

  /// The part of the prompt; none where it is not asked for.
  [[nodiscard]] std::optional<Json> echo() const;
  /// Some new tokens and the text that they add.
  Json part(const std::string& text, const std::vector<Choice>& choices, std::optional<FinishReason> reason);
  /// generation: nullptr where no token was asked for
  Json whole(const Generation* generation);

 private:
  [[nodiscard]] LogprobsWriter writer(std::size_t offset, bool with_special_tokens = false) const;
  [[nodiscard]] Json choice(const std::string& text, Json logprobs, std::optional<FinishReason> reason,
                            const std::vector<Choice>& new_tokens) const;

  const Job& job_;
  std::size_t row_, prompt_;
  const Echo* echo_;
  LogprobsWriter logprobs_;
};

}  // namespace chameleon::serve
