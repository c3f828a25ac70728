#include "cuda/scope.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Not in a CPU build of torch, where this library must load all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace sassha::cuda {

struct Scope::Guard {
  torch::stable::accelerator::DeviceGuard device;
};

Scope::Scope(const torch::stable::Tensor& tensor)
    : guard_(new Guard{torch::stable::accelerator::DeviceGuard(tensor.get_device_index())}) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}

Scope::~Scope() = default;

}  // namespace sassha::cuda
