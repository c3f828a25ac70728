// grad_norm: ||g||, or || |w| . g ||. Reads 4 bytes per float32 element (8 with w).
//
// Squares are summed in float64, per block in a fixed number of lanes, then block by block: the result depends neither
// on the number of threads nor on the vector width, and is exact to the last bit or two of float64.

#include <cmath>

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"

namespace sassha::cpu {
namespace {

constexpr int kLanes = 16;

template <class T, bool kAdaptive>
SASSHA_CLONES double sum_of_squares(const T* g, const T* w, int64_t n) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const double x = kAdaptive ? double(w[i + l]) * double(g[i + l]) : double(g[i + l]);
      lane[l] += x * x;
    }
  }
  for (; i < n; ++i) {
    const double x = kAdaptive ? double(w[i]) * double(g[i]) : double(g[i]);
    lane[i % kLanes] += x * x;
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

template <class P>
double block_sum(const P* g, const P* w, int64_t n) {
  Compute<P> g_tile[kTile], w_tile[kTile];
  double sum = 0;
  for_each_tile(0, n, [&](int64_t start, int64_t length) {
    const auto* g_values = load(g + start, g_tile, length);
    if (w == nullptr) {
      sum += sum_of_squares<Compute<P>, false>(g_values, nullptr, length);
    } else {
      sum += sum_of_squares<Compute<P>, true>(g_values, load(w + start, w_tile, length), length);
    }
  });
  return sum;
}

Tensor grad_norm(StableListHandle grad_list, StableListHandle param_list, bool adaptive) {
  const TensorList params(param_list);
  const TensorList grads(grad_list, params);
  STD_TORCH_CHECK(!grads.empty(), "grads is empty");
  const Blocks blocks(grads);
  std::vector<double> partial(blocks.count());
  with_dtype(grads.dtype(), [&](auto zero) {
    using P = decltype(zero);
    STD_TORCH_CHECK(grads.dtype() == params.dtype(), "grads and params differ in dtype");
    blocks.for_each_range([&](int64_t i, int64_t begin, int64_t end) {
      const P* g = grads.data<P>(i);
      const P* w = adaptive ? params.data<P>(i) : nullptr;
      for (int64_t start = begin; start < end; start += kBlock) {
        partial[blocks.first_block[i] + start / kBlock] =
            block_sum<P>(g + start, w == nullptr ? nullptr : w + start, std::min(kBlock, end - start));
      }
    });
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  Tensor norm = torch::stable::new_empty(grads.tensor(0), {}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(sum);
  return norm;
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("grad_norm", TORCH_BOX(&sassha::cpu::grad_norm)); }
