// /v1/completions: from the engine's tokens to a response or a stream.
#pragma once

#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "echo.h"
#include "job.h"

namespace chameleon::serve {

/// The answer to a job as one response; none if the client has gone. Throws ApiError, or an Error, of a row that
/// failed. is_connected: whether the client is still there
std::optional<Json> complete(const Job& job, const std::vector<Echo>& echoes,
                             const std::function<bool()>& is_connected);

/// The answer as server-sent events. A failure is one of them.
/// write: sends one event; false if the client has gone
void stream(const Job& job, const std::vector<Echo>& echoes, const std::function<bool()>& is_connected,
            const std::function<bool(std::string_view)>& write);

}  // namespace chameleon::serve
