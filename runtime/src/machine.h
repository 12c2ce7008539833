// What the machine has.
#pragma once

#include <cstddef>
#include <optional>

namespace chameleon {

/// The bytes of memory that this process may still take; none if the system does not say.
///
/// It is what Linux calls available, or less in a control group with a limit: what the limit leaves beside its use, of
/// which file pages that nobody has read for long do not count, as in Kubernetes.
std::optional<std::size_t> free_memory();

}  // namespace chameleon
