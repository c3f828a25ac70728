// From a tensor's dtype to a C++ type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace sassha::cpu {

using torch::headeronly::ScalarType;

// The dtype of the state of parameters, and of the scalars their arithmetic uses.
inline ScalarType state_dtype(ScalarType params) {
  return params == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const torch::stable::Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than its parameters call for");
}

inline void check_scalar(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, has ", tensor.numel());
}

inline void check_contiguous(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Calls body(P{}) with the C++ type of a supported dtype.
template <class Body>
void with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "parameters must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace sassha::cpu
