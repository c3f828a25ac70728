// The headers in this folder are compiled by the C++ compiler for the CPU and by nvcc for the GPU.
#pragma once

#if defined(__CUDACC__)
#define SASSHA_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define SASSHA_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SASSHA_HOST_DEVICE inline
#endif
