// Sums over all elements of a list: of squares for the norm, and of what tells whether everything is finite.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/vectors.h"

namespace sassha::cuda {

// Calls add(x, y) for this thread's elements: x of the first list, y of a second one, or x again where there is none.
// Several loads are on their way before the first is used: a single load would not fill the memory's pipes.
template <class P, class AnyTable, class Add>
__device__ __forceinline__ void for_each_element(const AnyTable& table, const Add& add) {
  constexpr bool kPairs = AnyTable::kListCount > 1;
  constexpr int kAhead = kVectorsPerChunk<P> < 4 ? kVectorsPerChunk<P> : 4;
  for (Chunks<P, AnyTable> chunks(table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int first = 0; first < kVectorsPerChunk<P>; first += kAhead) {
      P x[kAhead][kVector<P>], y[kAhead][kVector<P>];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const Place at = chunks.place(first + j);
        const P* from = table.template tensor<const P>(0, at.entry) + at.element;
        const P* second = table.template tensor<const P>(AnyTable::kListCount - 1, at.entry) + at.element;
        const bool vectors = at.template whole<P>() && aligned(from, second);
        load<Reuse::kSoon>(from, at.length, vectors, x[j]);
        if (kPairs) load<Reuse::kSoon>(second, at.length, vectors, y[j]);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
#pragma unroll
        for (int i = 0; i < kVector<P>; ++i) add(x[j][i], kPairs ? y[j][i] : x[j][i]);
      }
    }
  }
}

// The block's share of ||g||^2 or, with weights as a second list, of || |w| . g ||^2, in float64.
template <class P, class AnyTable>
__device__ double share_of_squares(const AnyTable& table) {
  double sum = 0;
  for_each_element<P>(table, [&](P g, P w) {
    const double gradient = widen(g);
    if (AnyTable::kListCount > 1) {
      const double weighted = gradient * static_cast<double>(widen(w));
      sum += weighted * weighted;
    } else if (sizeof(P) < sizeof(double)) {
      // The square is exact in float64: the fused operation has the same bits, in one instruction of two.
      sum = std::fma(gradient, gradient, sum);
    } else {
      sum += gradient * gradient;
    }
  });
  return block_sum(sum);
}

// Not finite if any of the block's share of elements is not; of float64 ones also if their squares are not, as in the
// norm.
template <class P, class AnyTable>
__device__ double share_of_findings(const AnyTable& table) {
  if constexpr (std::is_same_v<P, double>) {
    return share_of_squares<P>(table);
  } else {
    float sum = 0;
    for_each_element<P>(table, [&](P g, P) { sum += 0.0f * widen(g); });
    return block_sum(static_cast<double>(sum));
  }
}

}  // namespace sassha::cuda
