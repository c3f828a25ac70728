// Sums over all elements of a list: of squares for the norm, and of what tells whether everything is finite.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/compensated.h"
#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/vectors.h"

namespace sassha::cuda {

struct Nothing {
  __device__ void operator()() const {}
};

// Calls add(x, y) for this thread's elements: x of the first list, y of a second one, or x again where there is none;
// and finish() behind the 16 of each chunk. Several loads are on their way before the first is used: a single load
// would not fill the memory's pipes.
template <class P, class AnyTable, class Add, class Finish = Nothing>
__device__ __forceinline__ void for_each_element(const AnyTable& table, const Add& add, const Finish& finish = {}) {
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
    finish();
  }
}

// The block's share of ||g||^2 or, with weights as a second list, of || |w| . g ||^2, summed in float64.
template <class P, class AnyTable>
__device__ double share_in_float64(const AnyTable& table) {
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

// The block's share of what its threads have summed in float32. Where it is beyond float32, or so small that squares
// may have been lost below it, it is summed once more in float64: a norm of less than 2e-10, or one of more than 1e19.
//
// zero: whether all that this thread has summed was 0.
template <class InFloat64>
__device__ double share_of(const CompensatedSum& sum, bool zero, const InFloat64& share_in_float64) {
  // 2^30 elements that each lose 2^-147 change it in its 53rd binary digit.
  constexpr double kSmallest = 1 / 18446744073709551616.0;  // 2^-64
  const double share = block_sum(sum.value());
  if (share >= kSmallest) return share;  // NaN is not
  if (share == 0 && block_sum(zero ? 0.0 : 1.0) == 0) return 0;
  return share_in_float64();
}

// The same as share_in_float64, as exact, summed in float32.
template <class P, class AnyTable>
__device__ double share_in_float32(const AnyTable& table) {
  constexpr bool kWeighted = AnyTable::kListCount > 1;
  constexpr int kTermDigits = kDigits<P> * AnyTable::kListCount;
  CompensatedSum sum;
  bool zero = true;
  for_each_element<P>(
      table,
      [&](P g, P w) {
        const float gradient = widen(g);
        zero = zero && gradient == 0;
        const float term = kWeighted ? gradient * widen(w) : gradient;
        if constexpr (kTermDigits > kDigits<float>) {
          sum.add_square(term, std::fma(gradient, widen(w), -term));
        } else {
          sum.template add_square<(2 * kTermDigits <= kDigits<float>)>(term);
        }
      },
      [&] { sum.normalize(); });
  return share_of(sum, zero, [&] { return share_in_float64<P>(table); });
}

template <class P, class AnyTable>
__device__ double share_of_squares(const AnyTable& table) {
  if constexpr (kQuickFloat64 || std::is_same_v<P, double>) {
    return share_in_float64<P>(table);
  } else {
    return share_in_float32<P>(table);
  }
}

// The squares of what a kernel writes, summed on the way by the same means. T: its type, double or float.
template <class T>
class RunningSquares {
 public:
  __device__ __forceinline__ void add(T x) {
    if constexpr (std::is_same_v<T, double>) {
      sum_ += x * x;
    } else if constexpr (kQuickFloat64) {
      sum_ = std::fma(static_cast<double>(x), static_cast<double>(x), sum_);
    } else {
      zero_ = zero_ && x == 0;
      sum_.template add_square<false>(x);
    }
  }

  // Behind the 16 elements of each chunk.
  __device__ __forceinline__ void normalize() {
    if constexpr (!kInFloat64) sum_.normalize();
  }

  // The block's share, or what again() sums of it in float64.
  template <class Again>
  __device__ double share(const Again& again) const {
    if constexpr (kInFloat64) {
      return block_sum(sum_);
    } else {
      return share_of(sum_, zero_, again);
    }
  }

 private:
  static constexpr bool kInFloat64 = std::is_same_v<T, double> || kQuickFloat64;
  std::conditional_t<kInFloat64, double, CompensatedSum> sum_{};
  bool zero_ = true;
};

// Not finite if any of the block's share of elements is not; of float64 ones also if their squares are not, as in the
// norm.
template <class P, class AnyTable>
__device__ double share_of_findings(const AnyTable& table) {
  if constexpr (std::is_same_v<P, double>) {
    return share_in_float64<P>(table);
  } else {
    float sum = 0;
    for_each_element<P>(table, [&](P g, P) { sum += 0.0f * widen(g); });
    return block_sum(static_cast<double>(sum));
  }
}

}  // namespace sassha::cuda
