// Sums of squares of floats, as exact as in float64, by float32 operations alone.
#pragma once

#include <cmath>

#include "cuda/platform.h"

namespace sassha::cuda {

// x + y, and what its rounding lost: their sum is exactly x + y (Knuth).
__device__ __forceinline__ float two_sum(float x, float y, float& lost) {
  const float sum = x + y;
  const float added = sum - x;
  lost = (x - (sum - added)) + (y - added);
  return sum;
}

// The same where |x| >= |y| (Dekker).
__device__ __forceinline__ float fast_two_sum(float x, float y, float& lost) {
  const float sum = x + y;
  lost = y - (sum - x);
  return sum;
}

// A sum in three floats, each of which takes what the one before has lost (Dot3 of Ogita, Rump and Oishi, SIAM J. Sci.
// Comput. 26, 2005). Between two calls of normalize there may be 16 squares, whose sum is then exact to 2^-59.
//
// What is less than 2^-149 is lost as well, at most 2^-147 of each square, and a sum beyond float32 is NaN.
class CompensatedSum {
 public:
  // kExact: the square has no more than 24 digits.
  template <bool kExact>
  __device__ __forceinline__ void add_square(float x) {
    const float square = x * x;
    float lost;
    high_ = two_sum(high_, square, lost);
    add_middle(lost);
    if (!kExact) add_middle(std::fma(x, x, -square));
  }

  // Adds (x + rest)^2, where rest is less than the last place of x.
  __device__ __forceinline__ void add_square(float x, float rest) {
    add_square<false>(x);
    const float twice = x + x;
    const float mixed = twice * rest;
    add_middle(mixed);
    low_ += std::fma(rest, rest, std::fma(twice, rest, -mixed));
  }

  // Leaves to each float what the one before has no room for, so that the last one stays small.
  __device__ __forceinline__ void normalize() {
    high_ = fast_two_sum(high_, middle_, middle_);
    middle_ = fast_two_sum(middle_, low_, low_);
  }

  __device__ __forceinline__ double value() const { return (static_cast<double>(low_) + middle_) + high_; }

 private:
  __device__ __forceinline__ void add_middle(float x) {
    float lost;
    middle_ = two_sum(middle_, x, lost);
    low_ += lost;
  }

  float high_ = 0, middle_ = 0, low_ = 0;
};

}  // namespace sassha::cuda
