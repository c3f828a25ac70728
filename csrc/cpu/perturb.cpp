// perturb_: backup <- w, w <- w + eps* where the norm is finite. Moves 16 bytes per float32 element, and reads 4 more
// to measure the norm.

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/norm.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"
#include "math/sassha.h"

namespace sassha::cpu {
namespace {

template <class T, bool kAdaptive>
SASSHA_CLONES void perturb_tile(T* w, const T* g, int64_t n, T scale) {
  for (int64_t i = 0; i < n; ++i) w[i] = perturbed<T, kAdaptive>(w[i], g[i], scale);
}

// The weights are read just before they are written and stay in the caches; the backup is not, and is streamed.
// G: the dtype of what eps* points along, that of the weights or of their state.
template <class P, class G>
void perturb_range(P* w, const G* g, P* backup, int64_t n, Compute<P> scale, bool adaptive, bool streaming) {
  using T = Compute<P>;
  const auto perturb = adaptive ? perturb_tile<T, true> : perturb_tile<T, false>;
  for_each_tile(n, [&](int64_t start, int64_t length) {
    [[maybe_unused]] T w_tile[kTile], g_tile[kTile];
    if (backup) copy(backup + start, w + start, length, streaming);
    const T* gradient = load(g + start, g_tile, length);
    if constexpr (std::is_same_v<P, T>) {
      perturb(w + start, gradient, length, scale);
    } else {
      widen(w + start, w_tile, length);
      perturb(w_tile, gradient, length, scale);
      narrow(w_tile, w + start, length);
    }
  });
}

void perturb_(StableListHandle param_list, StableListHandle grad_list, std::optional<Tensor> backup,
              std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor layouts, Tensor norm, bool measure,
              Tensor per_row, std::vector<double> numbers) {
  const TensorList params(param_list, layouts);
  const TensorList grads(grad_list, params);
  const Settings settings = settings_of(numbers);
  check_perturb(params, grads, backup, offsets, rows, norm, per_row, settings);
  if (params.empty()) return;
  const ElementRanges ranges(params);
  const bool adaptive = settings.adaptive != 0;
  double& gradient_norm = *static_cast<double*>(norm.mutable_data_ptr());
  if (measure) gradient_norm = norm_of(grads, adaptive ? &params : nullptr);
  const bool finite = std::isfinite(gradient_norm);
  const double inverse = inverse_norm(gradient_norm);
  const auto* of_rows = static_cast<const RowSettings*>(per_row.const_data_ptr());
  with_dtype(params.dtype(), [&](auto zero) {
    using P = decltype(zero);
    using T = Compute<P>;
    P* backups = backup ? static_cast<P*>(backup->mutable_data_ptr()) : nullptr;
    const bool wider = grads.dtype() != params.dtype();
    const bool streaming = ranges.streaming<P>();
    ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
      P* w = params.data<P>(i) + begin;
      P* old = backups ? backups + offsets[i] + begin : nullptr;
      if (!finite) {
        if (old) copy(old, w, end - begin, streaming);
        return;
      }
      const T scale = perturbation_scale<T>(of_rows[rows[i]].rho, inverse, settings);
      if (wider) return perturb_range(w, grads.data<T>(i) + begin, old, end - begin, scale, adaptive, streaming);
      perturb_range(w, grads.data<P>(i) + begin, old, end - begin, scale, adaptive, streaming);
    });
  });
  params.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("perturb_", TORCH_BOX(&sassha::cpu::perturb_)); }
