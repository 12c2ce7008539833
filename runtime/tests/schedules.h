// Schedules of requests for the engine without its thread; the Python counterpart, which describes them, is
// tests/schedules.py.
#pragma once

#include "chameleon/runtime.h"
#include "shared_data.h"

namespace chameleon::test {

/// What a schedule gives: the rows of every submit, the tokens that they were streamed, and the iterations.
Json run_schedule(const Runtime& runtime, const Json& schedule);

}  // namespace chameleon::test
