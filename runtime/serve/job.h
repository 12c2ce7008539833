// A request for completions on its way to the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "schemas.h"
#include "service.h"

namespace chameleon::serve {

/// A request that was checked and submitted. Its rows are cancelled when it goes.
struct Job {
  Job(CompletionRequest request_, Served& served_) : request(std::move(request_)), served(served_) {}
  Job(const Job&) = delete;
  ~Job();

  [[nodiscard]] std::size_t num_rows() const { return ids.size() * static_cast<std::size_t>(request.n); }
  /// A whole response, or one chunk of a stream.
  [[nodiscard]] Json completion(Json choices) const;
  [[nodiscard]] Json usage(std::size_t new_tokens) const;

  CompletionRequest request;
  Served& served;
  std::string id;
  std::int64_t created = 0;
  Meant meant;
  std::vector<TokenIds> ids;  ///< of every prompt
  std::vector<std::int64_t> cluster_ids;
  std::optional<Stream> stream;  ///< none where no token is asked for
};

/// Check a request and submit it. Throws ApiError or an Error.
/// tenant: of the API key
std::shared_ptr<Job> prepare(CompletionRequest request, Served& served, const std::optional<std::string>& tenant,
                             const std::string& request_id);

}  // namespace chameleon::serve
