// The dtypes of parameters as CUDA stores them, and the types their arithmetic uses.
#pragma once

#include <limits>
#include <stdexcept>

#include "cuda/launchers.h"
#include "cuda/platform.h"
#include "math/compute.h"

namespace sassha::cuda {

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Binary digits of a number, the first one among them.
template <class P>
constexpr int kDigits = std::numeric_limits<P>::digits;
template <>
constexpr int kDigits<__nv_bfloat16> = 8;
template <>
constexpr int kDigits<__half> = 11;

// Rounds to nearest even.
template <class P>
__device__ __forceinline__ P narrow(Compute<P> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// The value of a one-element tensor.
__device__ __forceinline__ double value_of(const Scalar& scalar) {
  switch (scalar.dtype) {
    case Dtype::kDouble:
      return *static_cast<const double*>(scalar.data);
    case Dtype::kFloat:
      return *static_cast<const float*>(scalar.data);
    case Dtype::kBFloat16:
      return widen(*static_cast<const __nv_bfloat16*>(scalar.data));
    default:
      return widen(*static_cast<const __half*>(scalar.data));
  }
}

template <class P>
struct Type {
  using type = P;
};

// Host side: calls body(Type<P>{}) with the C++ type of a dtype.
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kDouble:
      return body(Type<double>{});
    case Dtype::kFloat:
      return body(Type<float>{});
    case Dtype::kBFloat16:
      return body(Type<__nv_bfloat16>{});
    case Dtype::kHalf:
      return body(Type<__half>{});
  }
  throw std::logic_error("unknown dtype");
}

}  // namespace sassha::cuda
