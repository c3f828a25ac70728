// hutchinson_: estimate <- estimate + z . Hz, the signs recomputed. Moves 8 (first sample) to 12 bytes per float32
// element.

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/signs.h"
#include "cpu/tiles.h"

namespace sassha::cpu {
namespace {

template <class T>
SASSHA_CLONES void accumulate_tile(const T* __restrict signs, const T* __restrict product, T* __restrict estimate,
                                   int64_t n, bool first, T samples) {
  if (first) {
    for (int64_t i = 0; i < n; ++i) estimate[i] = signs[i] * product[i];
  } else {
    for (int64_t i = 0; i < n; ++i) estimate[i] += signs[i] * product[i];
  }
  if (samples != 1) {
    for (int64_t i = 0; i < n; ++i) estimate[i] /= samples;
  }
}

void hutchinson_(StableListHandle product_list, Tensor estimate, std::vector<int64_t> offsets,
                 std::vector<int64_t> indices, int64_t seed, Tensor evaluation, int64_t sample, int64_t samples) {
  const TensorList products(product_list);
  check_hutchinson(products, estimate, offsets, indices, evaluation);
  if (products.empty()) return;
  const SignStream stream = sign_stream(seed, evaluation, sample);
  const bool first = sample == 0;
  const int64_t divisor = sample == samples - 1 ? samples : 1;
  with_dtype(products.dtype(), [&](auto zero) {
    using P = decltype(zero);
    using T = Compute<P>;
    T* estimates = static_cast<T*>(estimate.mutable_data_ptr());
    ElementRanges(products).for_each([&](int64_t i, int64_t begin, int64_t end) {
      SignReader<T> reader(stream);
      for_each_tile(end - begin, [&](int64_t start, int64_t n) {
        T signs[kTile], tile[kTile];
        const int64_t element = begin + start;
        reader.read(indices[i] + element, signs, n);
        const T* product = load(products.data<P>(i) + element, tile, n);
        accumulate_tile<T>(signs, product, estimates + offsets[i] + element, n, first, divisor);
      });
    });
  });
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("hutchinson_", TORCH_BOX(&sassha::cpu::hutchinson_)); }
