// The inner loop of the norm: the squares of many numbers, summed in float64 in a fixed order.
//
// The same bits on every processor: lane l adds up elements l, l + 32, l + 64, ..., however many of them are taken at
// once, and the square of a float is exact in float64, so that a fused multiply-add rounds as a sum does.
#pragma once

#include <cstdint>

#include "cpu/platform.h"

#if defined(SASSHA_VERSION)
#include <immintrin.h>
#endif

namespace sassha::cpu {

constexpr int kLanes = 32;

// How many places of memory are read in turns: reads in a single one leave much of the memory's bandwidth unused.
constexpr int kPlaces = 4;

template <class T>
SASSHA_CLONES void add_squares_in_turns(double* lanes, const T* x, int64_t quarter) {
  double sums[kLanes] = {};
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int l = 0; l < kLanes; ++l) {
        const double term = x[place * quarter + i + l];
        sums[l] += term * term;
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) lanes[l] += sums[l];
}

// Adds the squares of 4 * quarter numbers to the lanes; quarter is a multiple of kLanes.
inline void add_squares(double* lanes, const double* x, int64_t quarter) { add_squares_in_turns(lanes, x, quarter); }

#if defined(SASSHA_VERSION)
// By hand: compilers widen floats by shuffles, which take as long as the rest, where the processor does it as it loads.
SASSHA_VERSION("arch=x86-64-v4") inline void add_squares(double* lanes, const float* x, int64_t quarter) {
  constexpr int kWidth = 8, kVectors = kLanes / kWidth;
  __m512d sums[kVectors];
  for (__m512d& sum : sums) sum = _mm512_setzero_pd();
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int v = 0; v < kVectors; ++v) {
        const __m512d term = _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x + place * quarter + i + v * kWidth));
        sums[v] = _mm512_fmadd_pd(term, term, sums[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    double* const lane = lanes + v * kWidth;
    _mm512_storeu_pd(lane, _mm512_add_pd(_mm512_loadu_pd(lane), sums[v]));
  }
}

SASSHA_VERSION("arch=x86-64-v3") inline void add_squares(double* lanes, const float* x, int64_t quarter) {
  constexpr int kWidth = 4, kVectors = kLanes / kWidth;
  __m256d sums[kVectors];
  for (__m256d& sum : sums) sum = _mm256_setzero_pd();
  for (int64_t i = 0; i < quarter; i += kLanes) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int v = 0; v < kVectors; ++v) {
        const __m256d term = _mm256_cvtps_pd(_mm_loadu_ps(x + place * quarter + i + v * kWidth));
        sums[v] = _mm256_fmadd_pd(term, term, sums[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    double* const lane = lanes + v * kWidth;
    _mm256_storeu_pd(lane, _mm256_add_pd(_mm256_loadu_pd(lane), sums[v]));
  }
}

SASSHA_VERSION("default")
#endif
inline void add_squares(double* lanes, const float* x, int64_t quarter) { add_squares_in_turns(lanes, x, quarter); }

}  // namespace sassha::cpu
