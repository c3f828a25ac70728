// Starting a kernel: as many blocks as the device holds at once, and an error that names the operator.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"
#include "cuda/platform.h"
#include "cuda/table.h"
#include "cuda/vectors.h"

namespace sassha::cuda {

inline void check(cudaError_t error, const Target& target) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("sassha_fused::") + target.name + ": CUDA error: " + cudaGetErrorString(error));
}

// Blocks of no kernel here fill a multiprocessor beyond this: 2,048 threads are the most it holds.
constexpr int kMostBlocksEach = 8;

inline int multiprocessors(const Target& target) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), target);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), target);
  return count;
}

// How many blocks a launch has at most.
inline int64_t most_blocks(const Target& target) { return int64_t{multiprocessors(target)} * kMostBlocksEach; }

// As many blocks as run at the same time: the kernels walk on through what is left. Fewer for a short list.
template <class Arguments>
int blocks_for(const Target& target, void (*kernel)(Arguments), int64_t units) {
  constexpr int64_t kUnitsPerBlock = kThreads / kWarp * kChunkUnits;
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), target);
  const int64_t wanted = (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  const int64_t resident = int64_t{multiprocessors(target)} * std::min(each, kMostBlocksEach);
  return static_cast<int>(std::clamp(wanted, int64_t{1}, std::max(resident, int64_t{1})));
}

template <class Arguments>
void launch(const Target& target, void (*kernel)(Arguments), int blocks, const Arguments& arguments) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "CUDA takes no more");
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, static_cast<cudaStream_t>(target.stream)),
        target);
}

// One launch for all elements of the table in the arguments.
template <class Arguments>
void launch_over_table(const Target& target, void (*kernel)(Arguments), const Arguments& arguments) {
  const auto& table = arguments.table;
  launch(target, kernel, blocks_for(target, kernel, table.first_unit[table.count]), arguments);
}

}  // namespace sassha::cuda
