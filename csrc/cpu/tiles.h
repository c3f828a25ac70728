// Between memory and arithmetic: tiles that fit the first-level cache, in the compute type of their dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/platform.h"
#include "math/compute.h"

namespace sassha::cpu {

// Long enough that what a call for a tile costs does not count.
constexpr int64_t kTile = 256;

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

// The same, of elements that are about to be written over where they are.
template <class P>
const Compute<P>* copied(const P* source, Compute<P>* scratch, int64_t n) {
  if constexpr (std::is_same_v<P, Compute<P>>) {
    std::copy_n(source, n, scratch);
    return scratch;
  } else {
    return load(source, scratch, n);
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

// Has compute(tile) fill a tile and puts it to destination: directly where possible, else rounded to nearest even.
template <class P, class Fill>
void with_result(P* destination, int64_t n, bool streaming, const Fill& compute) {
  if constexpr (std::is_same_v<P, Compute<P>>) {
    if (!streaming) return compute(destination);
  }
  Compute<P> tile[kTile];
  compute(tile);
  if constexpr (std::is_same_v<P, Compute<P>>) {
    copy_streaming(destination, tile, n * static_cast<int64_t>(sizeof(P)));
  } else {
    P rounded[kTile];
    narrow(tile, rounded, n);
    copy(destination, rounded, n, streaming);
  }
}

// Calls body(start, length) for consecutive tiles of n elements.
template <class Body>
void for_each_tile(int64_t n, const Body& body) {
  for (int64_t start = 0; start < n; start += kTile) body(start, std::min(kTile, n - start));
}

}  // namespace sassha::cpu
