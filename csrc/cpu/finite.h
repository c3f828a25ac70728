// Whether all elements of a list of tensors are finite: a look at their bits, without arithmetic. Of float64 ones also
// whether the norm is, as on every backend.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/norm.h"

namespace sassha::cpu {

// The bits of infinity, the smallest magnitude that is refused.
template <class P>
struct Refused;
template <>
struct Refused<float> {
  static constexpr uint32_t kFrom = 0x7f800000;
};
template <>
struct Refused<torch::headeronly::BFloat16> {
  static constexpr uint16_t kFrom = 0x7f80;
};
template <>
struct Refused<torch::headeronly::Half> {
  static constexpr uint16_t kFrom = 0x7c00;
};

// Bits of which the first is set where an element is refused. Magnitudes are ordered as their bits are, so those that
// are refused, and no others, reach the sign's bit when the distance from kFrom to that bit is added.
template <class P>
SASSHA_HOST_DEVICE auto refusal(const P* x) {
  auto bits = Refused<P>::kFrom;
  using Bits = decltype(bits);
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  std::memcpy(&bits, x, sizeof(Bits));
  return static_cast<Bits>((bits & (kSign - 1)) + (kSign - Refused<P>::kFrom));
}

// Four places are read at once, as in the norm.
template <class P>
SASSHA_CLONES bool is_finite(const P* x, int64_t n) {
  auto found = Refused<P>::kFrom;
  found = 0;
  const int64_t quarter = n / 4;
  for (int64_t i = 0; i < quarter; ++i) {
    found |= refusal(x + i) | refusal(x + i + quarter) | refusal(x + i + 2 * quarter) | refusal(x + i + 3 * quarter);
  }
  for (int64_t i = 4 * quarter; i < n; ++i) found |= refusal(x + i);
  return found >> (8 * sizeof(found) - 1) == 0;
}

inline bool all_finite(const TensorList& tensors) {
  if (tensors.empty()) return true;
  std::atomic<bool> finite{true};
  with_dtype(tensors.dtype(), [&](auto zero) {
    using P = decltype(zero);
    if constexpr (std::is_same_v<P, double>) {
      finite = std::isfinite(norm_of(tensors));
    } else {
      ElementRanges(tensors).for_each([&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t start = begin; start < end && finite; start += kBlock) {
          if (!is_finite(tensors.data<P>(i) + start, std::min(kBlock, end - start))) finite = false;
        }
      });
    }
  });
  return finite;
}

}  // namespace sassha::cpu
