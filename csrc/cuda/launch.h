// Starting a kernel: as many blocks as the device holds at once, and an error that names the operator.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"
#include "cuda/platform.h"
#include "cuda/table.h"

namespace sassha::cuda {

inline void check(cudaError_t error, const Target& target) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("sassha_fused::") + target.name + ": CUDA error: " + cudaGetErrorString(error));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return std::max(count, 1);
}

// No kernel here has more blocks than this on one multiprocessor: the most threads it holds are 2,048.
constexpr int kMostBlocksEach = 8;

// Blocks for a number of elements: the kernels walk on through what is left, so no more than run at the same time.
template <class Arguments>
int blocks_for(void (*kernel)(Arguments), int64_t units) {
  int each = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
  const int64_t units_per_block = int64_t{4} * (kThreads / kWarp);
  const int64_t wanted = (units + units_per_block - 1) / units_per_block;
  const int64_t resident = int64_t{multiprocessors()} * std::clamp(each, 1, kMostBlocksEach);
  return static_cast<int>(std::clamp(wanted, int64_t{1}, resident));
}

template <class Arguments>
void launch(const Target& target, void (*kernel)(Arguments), int blocks, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "CUDA takes no more");
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(target.stream)),
        target);
}

}  // namespace sassha::cuda
