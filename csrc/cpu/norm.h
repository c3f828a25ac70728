// The norm of a list of tensors, and with it whether all their elements are finite.
//
// Squares are summed in float64, per block in a fixed number of lanes, then block by block: the result depends neither
// on the number of threads nor on the vector width, and is exact to the last bit or two of float64.
#pragma once

#include <cmath>
#include <numeric>

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"

namespace sassha::cpu {

constexpr int kLanes = 16;

// How many elements ahead memory is asked for.
constexpr int64_t kAhead = 8 * kLanes;

template <class P, bool kAdaptive>
inline double term(const P* g, const P* w, int64_t i) {
  const double gradient = static_cast<Compute<P>>(g[i]);
  const double x = kAdaptive ? gradient * static_cast<Compute<P>>(w[i]) : gradient;
  return x * x;
}

template <class P, bool kAdaptive>
inline void add_terms(double* lane, const P* g, const P* w, int64_t start) {
  prefetch(g + start + kAhead, kLanes * sizeof(P));
  if (kAdaptive) prefetch(w + start + kAhead, kLanes * sizeof(P));
  for (int l = 0; l < kLanes; ++l) lane[l] += term<P, kAdaptive>(g, w, start + l);
}

// One block. Four places are read at once: reads in a single place leave much of the memory's bandwidth unused.
template <class P, bool kAdaptive>
SASSHA_CLONES double sum_of_squares(const P* g, const P* w, int64_t n) {
  double lane0[kLanes] = {}, lane1[kLanes] = {}, lane2[kLanes] = {}, lane3[kLanes] = {};
  const int64_t quarter = n / (4 * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes) {
    add_terms<P, kAdaptive>(lane0, g, w, i);
    add_terms<P, kAdaptive>(lane1, g, w, i + quarter);
    add_terms<P, kAdaptive>(lane2, g, w, i + 2 * quarter);
    add_terms<P, kAdaptive>(lane3, g, w, i + 3 * quarter);
  }
  int64_t i = 4 * quarter;
  for (; i + kLanes <= n; i += kLanes) add_terms<P, kAdaptive>(lane0, g, w, i);
  double sum = 0;
  for (; i < n; ++i) sum += term<P, kAdaptive>(g, w, i);
  if (n < kLanes) return sum;
  for (int l = 0; l < kLanes; ++l) sum += (lane0[l] + lane1[l]) + (lane2[l] + lane3[l]);
  return sum;
}

// ||g||, or, with weights w, || |w| . g ||.
inline double norm_of(const TensorList& grads, const TensorList* weights = nullptr) {
  std::vector<int64_t> first_block(grads.size() + 1);
  for (int64_t i = 0; i < grads.size(); ++i) {
    first_block[i + 1] = first_block[i] + (grads.numel(i) + kBlock - 1) / kBlock;
  }
  std::vector<double> partial(first_block.back());
  with_dtype(grads.dtype(), [&](auto zero) {
    using P = decltype(zero);
    const auto block_sum = weights ? sum_of_squares<P, true> : sum_of_squares<P, false>;
    ElementRanges(grads).for_each([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t start = begin; start < end; start += kBlock) {
        const P* w = weights ? weights->data<P>(i) + start : nullptr;
        partial[first_block[i] + start / kBlock] =
            block_sum(grads.data<P>(i) + start, w, std::min(kBlock, end - start));
      }
    });
  });
  return std::sqrt(std::accumulate(partial.begin(), partial.end(), 0.0));
}

}  // namespace sassha::cpu
