// H, the regular Hadamard matrix that int8 graphs rotate channels by.
#pragma once

#include <cstddef>
#include <span>
#include <tuple>

namespace chameleon {

/// Multiply blocks of channels by H, a Kronecker power of J/2 - R, where J is four by four of ones and R reverses four
/// channels. block: a power of four
template <class T>
void rotate(std::span<T> x, std::size_t block) {
  for (std::size_t stride = 1; stride < block; stride *= 4) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (i / stride % 4 != 0) continue;  // the first of four channels
      T &a = x[i], &b = x[i + stride], &c = x[i + 2 * stride], &d = x[i + 3 * stride];
      const T half = (((a + b) + c) + d) / 2;
      std::tie(a, b, c, d) = std::tuple(half - d, half - c, half - b, half - a);
    }
  }
}

}  // namespace chameleon
