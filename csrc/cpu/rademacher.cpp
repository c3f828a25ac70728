// rademacher_: the probe z of an exact Hessian product. Writes 4 bytes per float32 element.

#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/signs.h"
#include "cpu/tiles.h"

namespace sassha::cpu {
namespace {

void rademacher_(StableListHandle sign_list, std::vector<int64_t> indices, int64_t seed, int64_t evaluation,
                 int64_t sample) {
  const TensorList signs(sign_list);
  if (signs.empty()) return;
  const SignStream stream{static_cast<uint64_t>(seed), static_cast<uint32_t>(evaluation),
                          static_cast<uint32_t>(sample)};
  const Blocks blocks(signs);
  with_dtype(signs.dtype(), [&](auto zero) {
    using P = decltype(zero);
    const bool streaming = blocks.elements * static_cast<int64_t>(sizeof(P)) > kStreamingBytes;
    blocks.for_each_range([&](int64_t i, int64_t begin, int64_t end) {
      Compute<P> tile[kTile];
      for_each_tile(begin, end, [&](int64_t start, int64_t n) {
        fill_signs(stream, indices[i] + start, tile, n);
        store(signs.data<P>(i) + start, tile, n, streaming);
      });
    });
  });
  signs.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("rademacher_", TORCH_BOX(&sassha::cpu::rademacher_)); }
