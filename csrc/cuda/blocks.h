// exp_hessian where several elements share a number of it.
#pragma once

#include <algorithm>

#include "cuda/platform.h"
#include "math/sassha.h"

namespace sassha::cuda {

// The same blocks, counted from the element of the flat state on where a table begins.
inline Blocks blocks_from(const Blocks& blocks, int64_t origin) {
  return {blocks.shift, std::max(blocks.end - origin, int64_t{0})};
}

// Where some elements in a row have their numbers; the first is a multiple of how many they are.
struct Shared {
  const int shift;
  const int64_t first;

  __device__ Shared(const Blocks& blocks, int64_t element)
      : shift(blocks.shift_of(element)),
        first(blocks.index(element)),
        within_(static_cast<int>(element) & (length() - 1)) {}

  // Of a block.
  __device__ int length() const { return 1 << shift; }

  __device__ int64_t index(int i) const { return first + (i >> shift); }

  // Whether the i-th is the first of its block.
  __device__ bool starts(int i) const { return ((within_ + i) & (length() - 1)) == 0; }

 private:
  const int within_;
};

// Neighbours of a block have what the first of them has read.
template <class T, int kCount>
__device__ __forceinline__ void load_shared(const T* from, const Shared& at, int length, T (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if ((i & (at.length() - 1)) != 0) {
      to[i] = to[i - 1];
    } else {
      to[i] = i < length ? from[at.index(i)] : T();
    }
  }
}

// Each block's by the thread that has its first element.
template <class T, int kCount>
__device__ __forceinline__ void store_shared(const T (&from)[kCount], const Shared& at, int length, T* to) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < length && at.starts(i)) to[at.index(i)] = from[i];
  }
}

}  // namespace sassha::cuda
