// The first stage of the norm: each block sums the squares of what it reads, in float64 and in a fixed order.
#pragma once

#include <cmath>

#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/vectors.h"

namespace sassha::cuda {

// A product of two float32 numbers, or narrower ones, is exact in float64.
template <class P>
__device__ __forceinline__ double wide_product(P x, P y) {
  return static_cast<double>(widen(x)) * static_cast<double>(widen(y));
}

// The block's share of ||g||^2 or, with weights as a second list, of || |w| . g ||^2. Several loads are on their way
// before the first is used: one stream alone would not fill the memory's pipes otherwise.
template <class P, class AnyTable>
__device__ double share_of_squares(const AnyTable& table) {
  constexpr bool kWeighted = AnyTable::kListCount > 1;
  constexpr bool kSquareIsExact = !kWeighted && sizeof(P) < sizeof(double);
  constexpr int kAhead = kVectorsPerChunk<P> < 4 ? kVectorsPerChunk<P> : 4;
  double sum = 0;
  for (Chunks<P, AnyTable> chunks(table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int first = 0; first < kVectorsPerChunk<P>; first += kAhead) {
      P g[kAhead][kVector<P>], w[kAhead][kVector<P>];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const Place at = chunks.place(first + j);
        const P* gradient = table.template tensor<const P>(0, at.entry) + at.element;
        if (kWeighted) {
          const P* weight = table.template tensor<const P>(AnyTable::kListCount - 1, at.entry) + at.element;
          const bool vectors = at.template whole<P>() && aligned(gradient, weight);
          load<Reuse::kSoon>(gradient, at.length, vectors, g[j]);
          load<Reuse::kSoon>(weight, at.length, vectors, w[j]);
        } else {
          load<Reuse::kSoon>(gradient, at.length, at.template whole<P>() && aligned(gradient), g[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
#pragma unroll
        for (int i = 0; i < kVector<P>; ++i) {
          const double x = kWeighted ? wide_product(g[j][i], w[j][i]) : static_cast<double>(widen(g[j][i]));
          // Where the square is exact in float64 the fused operation has the same bits, in one instruction of two.
          sum = kSquareIsExact ? std::fma(x, x, sum) : sum + x * x;
        }
      }
    }
  }
  return block_sum(sum);
}

}  // namespace sassha::cuda
