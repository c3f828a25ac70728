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

// Whether a chip does float64 at half the rate of float32. Others, unknown ones too, are taken to do it at a 64th.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr bool kQuickFloat64 = true;
#else
constexpr bool kQuickFloat64 = false;
#endif

}  // namespace sassha::cuda
