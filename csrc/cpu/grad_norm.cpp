// grad_norm: ||g||, or || |w| . g ||. Reads 4 bytes per float32 element (8 with w).
//
// Squares are summed in float64, per block in a fixed number of lanes, then block by block: the result depends neither
// on the number of threads nor on the vector width, and is exact to the last bit or two of float64.

#include <cmath>

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"
#include "math/portable.h"

namespace sassha::cpu {
namespace {

constexpr int kLanes = 16;

template <class P, bool kAdaptive>
SASSHA_HOST_DEVICE double term(const P* g, const P* w, int64_t i) {
  const double gradient = static_cast<Compute<P>>(g[i]);
  const double x = kAdaptive ? gradient * static_cast<Compute<P>>(w[i]) : gradient;
  return x * x;
}

template <class P, bool kAdaptive>
SASSHA_HOST_DEVICE void add_terms(double* lane, const P* g, const P* w, int64_t start) {
  for (int l = 0; l < kLanes; ++l) lane[l] += term<P, kAdaptive>(g, w, start + l);
}

// One block. Four places are read at once: a single stream of reads leaves much of the memory's bandwidth unused.
template <class P, bool kAdaptive>
SASSHA_CLONES double sum_of_squares(const P* g, const P* w, int64_t n) {
  double lane0[kLanes] = {}, lane1[kLanes] = {}, lane2[kLanes] = {}, lane3[kLanes] = {};
  const int64_t quarter = n / (4 * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes) {
    add_terms<P, kAdaptive>(lane0, g, w, i);
    add_terms<P, kAdaptive>(lane1, g, w, i + quarter);
    add_terms<P, kAdaptive>(lane2, g, w, i + 2 * quarter);
    add_terms<P, kAdaptive>(lane3, g, w, i + 3 * quarter);
  }
  int64_t i = 4 * quarter;
  for (; i + kLanes <= n; i += kLanes) add_terms<P, kAdaptive>(lane0, g, w, i);
  double sum = 0;
  for (; i < n; ++i) sum += term<P, kAdaptive>(g, w, i);
  if (n < kLanes) return sum;
  for (int l = 0; l < kLanes; ++l) sum += (lane0[l] + lane1[l]) + (lane2[l] + lane3[l]);
  return sum;
}

Tensor grad_norm(StableListHandle grad_list, StableListHandle param_list, bool adaptive) {
  const TensorList params(param_list);
  const bool alone = params.empty() && !adaptive;
  const TensorList grads = alone ? TensorList(grad_list) : TensorList(grad_list, params);
  STD_TORCH_CHECK(!grads.empty(), "grads is empty");
  STD_TORCH_CHECK(alone || grads.dtype() == params.dtype(), "grads and params differ in dtype");
  std::vector<int64_t> first_block(grads.size() + 1);
  for (int64_t i = 0; i < grads.size(); ++i) {
    first_block[i + 1] = first_block[i] + (grads.numel(i) + kBlock - 1) / kBlock;
  }
  std::vector<double> partial(first_block.back());
  with_dtype(grads.dtype(), [&](auto zero) {
    using P = decltype(zero);
    const auto block_sum = adaptive ? sum_of_squares<P, true> : sum_of_squares<P, false>;
    ElementRanges(grads).for_each([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t start = begin; start < end; start += kBlock) {
        const P* w = adaptive ? params.data<P>(i) + start : nullptr;
        partial[first_block[i] + start / kBlock] =
            block_sum(grads.data<P>(i) + start, w, std::min(kBlock, end - start));
      }
    });
  });
  const double sum = std::accumulate(partial.begin(), partial.end(), 0.0);
  Tensor norm = torch::stable::new_empty(grads.tensor(0), {}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(sum);
  return norm;
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("grad_norm", TORCH_BOX(&sassha::cpu::grad_norm)); }
