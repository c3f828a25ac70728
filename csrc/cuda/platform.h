// CUDA's names: nvcc's own, or those of the emulation in tests/, which runs these sources on a CPU.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>

namespace sassha::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

}  // namespace sassha::cuda
