// perturb_: backup <- w, w <- w + eps*. Moves 16 bytes per float32 element.

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"
#include "math/sassha.h"

namespace sassha::cpu {
namespace {

template <class T, bool kAdaptive>
SASSHA_CLONES void perturb_tile(const T* w, const T* g, T* result, int64_t n, T scale) {
  for (int64_t i = 0; i < n; ++i) result[i] = perturbed<T, kAdaptive>(w[i], g[i], scale);
}

template <class P>
void perturb_range(P* w, const P* g, P* backup, int64_t begin, int64_t end, Compute<P> scale, bool adaptive,
                   bool streaming) {
  using T = Compute<P>;
  T w_tile[kTile], g_tile[kTile], result[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t n) {
    const T* w_values = load(w + start, w_tile, n);
    const T* g_values = load(g + start, g_tile, n);
    const auto tile = adaptive ? perturb_tile<T, true> : perturb_tile<T, false>;
    tile(w_values, g_values, result, n, scale);
    copy(backup + start, w + start, n, streaming);
    store(w + start, result, n, streaming);
  });
}

void perturb_(StableListHandle param_list, StableListHandle grad_list, Tensor backup, std::vector<int64_t> offsets,
              Tensor norm, double rho, bool adaptive, bool maximize) {
  const TensorList params(param_list);
  const TensorList grads(grad_list, params);
  if (params.empty()) return;
  const Blocks blocks(params);
  const double gradient_norm = *static_cast<const double*>(norm.const_data_ptr());
  with_dtype(params.dtype(), [&](auto zero) {
    using P = decltype(zero);
    STD_TORCH_CHECK(grads.dtype() == params.dtype(), "grads and params differ in dtype");
    P* backups = static_cast<P*>(backup.mutable_data_ptr());
    const auto scale = perturbation_scale<Compute<P>>(rho, gradient_norm, maximize);
    const bool streaming = blocks.elements * static_cast<int64_t>(sizeof(P)) > kStreamingBytes;
    blocks.for_each_range([&](int64_t i, int64_t begin, int64_t end) {
      perturb_range<P>(params.data<P>(i), grads.data<P>(i), backups + offsets[i], begin, end, scale, adaptive,
                       streaming);
    });
  });
  params.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("perturb_", TORCH_BOX(&sassha::cpu::perturb_)); }
