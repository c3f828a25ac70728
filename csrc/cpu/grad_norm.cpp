// grad_norm: ||g||, or || |w| . g ||. Reads 4 bytes per float32 element (8 with w).

#include "arguments.h"
#include "cpu/norm.h"

namespace sassha::cpu {
namespace {

Tensor grad_norm(StableListHandle grad_list, StableListHandle param_list, std::optional<Tensor> layouts,
                 bool adaptive) {
  const TensorList params(param_list, layouts);
  const bool alone = params.empty() && !adaptive;
  const TensorList grads = alone ? TensorList(grad_list) : TensorList(grad_list, params);
  check_grad_norm(params, grads, alone);
  Tensor norm = torch::stable::new_empty(grads.tensor(0), {}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = norm_of(grads, adaptive ? &params : nullptr);
  return norm;
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("grad_norm", TORCH_BOX(&sassha::cpu::grad_norm)); }
