// The norm of a list of tensors.
//
// Squares are summed in float64, block by block, each block in a fixed number of lanes: the result depends neither on
// the number of threads nor on the vector width, and is exact to the last bit or two of float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/squares.h"
#include "cpu/tiles.h"

namespace sassha::cpu {

// What is squared: the gradients as they are computed with, or in float64 their products with the weights.
template <class P, bool kAdaptive>
using Term = std::conditional_t<kAdaptive, double, Compute<P>>;

template <class P, bool kAdaptive>
SASSHA_CLONES void terms_of(const P* __restrict g, const P* __restrict w, Term<P, kAdaptive>* __restrict terms,
                            int64_t n) {
  using T = Term<P, kAdaptive>;
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = static_cast<Compute<P>>(g[i]);
    terms[i] = kAdaptive ? gradient * static_cast<T>(static_cast<Compute<P>>(w[i])) : gradient;
  }
}

// One block.
template <class P, bool kAdaptive>
double sum_of_squares(const P* g, const P* w, int64_t n) {
  using T = Term<P, kAdaptive>;
  constexpr int64_t kTurn = 256;
  double lanes[kLanes] = {};
  T terms[kPlaces * kTurn];
  const int64_t quarter = n / (kPlaces * kLanes) * kLanes;
  if constexpr (std::is_same_v<P, T> && !kAdaptive) {
    add_squares(lanes, g, quarter);
  } else {
    for (int64_t start = 0; start < quarter; start += kTurn) {
      const int64_t length = std::min(kTurn, quarter - start);
      for (int place = 0; place < kPlaces; ++place) {
        const int64_t from = place * quarter + start;
        terms_of<P, kAdaptive>(g + from, w + from, terms + place * length, length);
      }
      add_squares(lanes, terms, length);
    }
  }
  if (const int64_t done = kPlaces * quarter; done < n) {
    std::fill_n(terms, kPlaces * kLanes, T{0});
    terms_of<P, kAdaptive>(g + done, w + done, terms, n - done);
    add_squares(lanes, terms, kLanes);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// The sums of squares of a list of tensors, one for each block of a tensor.
class BlockSums {
 public:
  explicit BlockSums(const TensorList& tensors) : first_block_(tensors.size() + 1) {
    for (int64_t i = 0; i < tensors.size(); ++i) {
      first_block_[i + 1] = first_block_[i] + (tensors.numel(i) + kBlock - 1) / kBlock;
    }
    sums_.resize(first_block_.back());
  }

  // Of the block of tensor i that begins with this element.
  double& of(int64_t i, int64_t element) { return sums_[first_block_[i] + element / kBlock]; }

  double norm() const { return std::sqrt(std::accumulate(sums_.begin(), sums_.end(), 0.0)); }

 private:
  std::vector<int64_t> first_block_;
  std::vector<double> sums_;
};

// Calls body(start, length) for the blocks of a range of elements.
template <class Body>
void for_each_block(int64_t begin, int64_t end, const Body& body) {
  for (int64_t start = begin; start < end; start += kBlock) body(start, std::min(kBlock, end - start));
}

// ||g||, or, with weights w, || |w| . g ||.
inline double norm_of(const TensorList& grads, const TensorList* weights = nullptr) {
  BlockSums sums(grads);
  with_dtype(grads.dtype(), [&](auto zero) {
    using P = decltype(zero);
    const auto block_sum = weights ? sum_of_squares<P, true> : sum_of_squares<P, false>;
    const TensorList& factors = weights ? *weights : grads;  // not read where there are no weights
    ElementRanges(grads).for_each([&](int64_t i, int64_t begin, int64_t end) {
      for_each_block(begin, end, [&](int64_t start, int64_t length) {
        sums.of(i, start) = block_sum(grads.data<P>(i) + start, factors.data<P>(i) + start, length);
      });
    });
  });
  return sums.norm();
}

}  // namespace sassha::cpu
