// CUDA's names for g++: sources of csrc/cuda, kernels and launchers alike, compiled and run on the CPU, for tests.
//
// Blocks run one after the other. Every thread of a block is a fiber; barriers and warp collectives switch fibers, and
// nothing else does, so threads that meet no barrier run as a plain loop.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// The tag becomes part of the symbol's name, by which emulation::shared_memory finds the variable.
#define __shared__ static __attribute__((abi_tag("cuda_shared")))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return torch::headeronly::Half(x.bits, torch::headeronly::Half::from_bits()); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return torch::headeronly::BFloat16(x.bits, torch::headeronly::BFloat16::from_bits());
}
// CUDA has one NaN for all.
inline __half __float2half_rn(float x) { return {x != x ? uint16_t{0x7FFF} : torch::headeronly::Half(x).x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {x != x ? uint16_t{0x7FFF} : torch::headeronly::BFloat16(x).x};
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// One access of the full width, which -fsanitize=alignment checks.
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace emulation {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlocks = 0x7FFFFFFF;
constexpr size_t kMaxArgumentBytes = 32764;
constexpr size_t kMaxSharedBytes = 48 << 10;
template <class T>
T shuffle(Collective collective, uint32_t mask, T value, int source) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = scheduler().meet(collective, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

template <class Arguments>
void call(const void* kernel, const void* argument) {
  reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(kernel))(*static_cast<const Arguments*>(argument));
}

}  // namespace emulation

inline void __syncthreads() { emulation::scheduler().barrier(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(emulation::Collective::kShuffle, mask, value, source & (emulation::kWarp - 1));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = emulation::lane();
  const int source = delta < static_cast<unsigned>(emulation::kWarp - lane) ? lane + static_cast<int>(delta) : lane;
  return emulation::shuffle(emulation::Collective::kShuffleDown, mask, value, source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle(emulation::Collective::kShuffleXor, mask, value, emulation::lane() ^ lanes);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = emulation::device().multiprocessors;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulation::device().blocks_per_multiprocessor;
  return cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  static_assert(std::is_trivially_copyable_v<Arguments>, "kernel arguments are copied byte by byte");
  const bool one_dimensional = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;  // all that is emulated
  if (!one_dimensional || grid.x == 0 || grid.x > emulation::kMaxBlocks || block.x == 0 ||
      block.x > emulation::kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (sizeof(Arguments) > emulation::kMaxArgumentBytes || shared_bytes > emulation::kMaxSharedBytes) {
    return cudaErrorInvalidValue;
  }
  if (emulation::device().refuses) return cudaErrorInvalidValue;
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const emulation::Intercept intercept = emulation::device().intercept) {
    intercept(emulation::kernel_name(address).c_str(), static_cast<int>(grid.x), static_cast<int>(block.x),
              arguments[0], sizeof(Arguments));
  } else {
    emulation::scheduler().launch(emulation::call<Arguments>, address, arguments[0], grid.x, block.x);
  }
  return cudaSuccess;
}
