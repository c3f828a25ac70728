// rademacher_: the probe z of an exact Hessian product. Writes 4 bytes per float32 element.

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/signs.h"

namespace sassha::cuda {

struct RademacherArguments {
  SignTable table;
  SignArguments signs;
};

template <class P>
__global__ void __launch_bounds__(kThreads) rademacher_kernel(const __grid_constant__ RademacherArguments a) {
  const SignStream stream = a.signs.stream();
  for (Chunks<P, SignTable> chunks(a.table); chunks.more(); chunks.next()) {
    const WarpSigns signs(a.table, stream, chunks.first_unit());
#pragma unroll
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      Compute<P> z[kVector<P>];
      signs.read(a.table, at, z);
      P* const to = a.table.tensor<P>(0, at.entry) + at.element;
      P rounded[kVector<P>];
#pragma unroll
      for (int i = 0; i < kVector<P>; ++i) rounded[i] = narrow<P>(z[i]);
      store<Reuse::kSoon>(rounded, at.length, at.whole<P>() && aligned(to), to);
    }
  }
}

void rademacher(const Target& target, const std::vector<int64_t>& numel, const Tensors& signs, const Signs& stream) {
  with_dtype(signs.dtype, [&](auto type) {
    const auto kernel = rademacher_kernel<typename decltype(type)::type>;
    for_each_table<SignTable>(
        numel, nullptr,
        [&](SignTable& table, int entry, int64_t i) {
          table.data[0][entry] = signs.data[i];
          table.index[entry] = stream.indices[i];
        },
        [&](const SignTable& table, int64_t) {
          launch_over_table(target, kernel,
                            RademacherArguments{table, {stream.seed, stream.evaluation, stream.sample}});
        });
  });
}

}  // namespace sassha::cuda
