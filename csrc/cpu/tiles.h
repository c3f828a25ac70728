// Between memory and arithmetic: tiles that fit the first-level cache, in the compute type of their dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/platform.h"

namespace sassha::cpu {

constexpr int64_t kTile = 1024;

template <class P>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class P>
using Compute = typename ComputeType<P>::type;

template <class P>
SASSHA_CLONES void widen(const P* source, float* tile, int64_t n) {
  for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<float>(source[i]);
}

template <class P>
SASSHA_CLONES void narrow(const float* tile, P* destination, int64_t n) {
  for (int64_t i = 0; i < n; ++i) destination[i] = static_cast<P>(tile[i]);
}

// The elements in the compute type: in place where that is how they are stored, else converted into scratch.
template <class P>
const Compute<P>* load(const P* source, Compute<P>* scratch, int64_t n) {
  if constexpr (std::is_same_v<P, Compute<P>>) {
    return source;
  } else {
    widen(source, scratch, n);
    return scratch;
  }
}

template <class P>
void copy(P* destination, const P* source, int64_t n, bool streaming) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(P));
  if (streaming) {
    copy_streaming(destination, source, bytes);
  } else {
    std::memcpy(destination, source, bytes);
  }
}

// Rounds to nearest even where P is narrower than the compute type.
template <class P>
void store(P* destination, const Compute<P>* tile, int64_t n, bool streaming) {
  if constexpr (std::is_same_v<P, Compute<P>>) {
    copy(destination, tile, n, streaming);
  } else {
    P rounded[kTile];
    narrow(tile, rounded, n);
    copy(destination, rounded, n, streaming);
  }
}

// Calls body(start, length) for consecutive tiles of [begin, end).
template <class Body>
void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  for (int64_t start = begin; start < end; start += kTile) body(start, std::min(kTile, end - start));
}

}  // namespace sassha::cpu
