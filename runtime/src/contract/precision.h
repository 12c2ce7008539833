// What precisions have in common.
#pragma once

#include <string_view>

namespace chameleon {

/// Whether a precision has a rotated trunk, and a head and a cache in int8: int8 and int4.
inline bool is_integer(std::string_view precision) { return precision == "int8" || precision == "int4"; }

}  // namespace chameleon
