// rademacher_: the probe z of an exact Hessian product. Writes 4 bytes per float32 element.

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/signs.h"
#include "cpu/tiles.h"

namespace sassha::cpu {
namespace {

void rademacher_(StableListHandle sign_list, std::vector<int64_t> indices, int64_t seed, Tensor evaluation,
                 int64_t sample) {
  const TensorList signs(sign_list);
  check_indices(indices, signs.size());
  check_evaluation(evaluation);
  if (signs.empty()) return;
  const SignStream stream = sign_stream(seed, evaluation, sample);
  const ElementRanges ranges(signs);
  with_dtype(signs.dtype(), [&](auto zero) {
    using P = decltype(zero);
    ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
      SignReader<Compute<P>> reader(stream);
      for_each_tile(end - begin, [&](int64_t start, int64_t n) {
        with_result(signs.data<P>(i) + begin + start, n, ranges.streaming<P>(),
                    [&](Compute<P>* tile) { reader.read(indices[i] + begin + start, tile, n); });
      });
    });
  });
  signs.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("rademacher_", TORCH_BOX(&sassha::cpu::rademacher_)); }
