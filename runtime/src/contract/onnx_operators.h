// What a graph contains, read from its bytes before ONNX Runtime sees it: see docs/bundle-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>

namespace chameleon {

/// Refuse the bytes of a ModelProto that export cannot have written: other operators, functions, large constants in
/// the graph's own file, nodes that make a constant of another size out of constants, constants of many times the
/// bundle's size. Throws GraphError.
/// sizes: bytes of every file that the bundle lists, by name; external data may be in those alone
/// where: named in messages
void check_model(std::span<const std::byte> data, const std::map<std::string, std::int64_t>& sizes,
                 const std::string& where);

}  // namespace chameleon
