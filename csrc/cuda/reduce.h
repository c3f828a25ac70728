// Sums over a block of threads, always in the same order.
#pragma once

#include "cuda/platform.h"

namespace sassha::cuda {

// The sum of every thread's x, to every thread of the block.
__device__ inline double block_sum(double x) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double of_warp[kWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  // The sums of the call before may still be being read.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

// The sum of an array, to every thread of the block.
__device__ inline double block_sum(const double* values, int64_t count) {
  double x = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) x += values[i];
  return block_sum(x);
}

}  // namespace sassha::cuda
