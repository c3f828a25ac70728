// hutchinson_: estimate <- estimate + z . Hz, the signs recomputed. Moves 8 (first sample) to 12 bytes per float32
// element.

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/signs.h"

namespace sassha::cuda {

struct HutchinsonArguments {
  SignTable table;  // products
  SignArguments signs;
  void* estimate;  // where the table's first unit lies
  bool first;
  int64_t divisor;
};

template <class P>
__global__ void __launch_bounds__(kThreads) hutchinson_kernel(const __grid_constant__ HutchinsonArguments a) {
  using T = Compute<P>;
  const SignStream stream = a.signs.stream();
  const T divisor = static_cast<T>(a.divisor);
  for (Chunks<P, SignTable> chunks(a.table); chunks.more(); chunks.next()) {
    const WarpSigns signs(a.table, stream, chunks.first_unit());
#pragma unroll
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      T z[kVector<P>], sum[kVector<P>];
      P product[kVector<P>];
      signs.read(a.table, at, z);
      const P* const products = a.table.tensor<const P>(0, at.entry) + at.element;
      T* const estimate = static_cast<T*>(a.estimate) + at.flat;
      const bool vectors = at.whole<P>() && aligned(products, estimate);
      load<Reuse::kLate>(products, at.length, vectors, product);
      if (!a.first) load<Reuse::kSoon>(estimate, at.length, vectors, sum);
#pragma unroll
      for (int i = 0; i < kVector<P>; ++i) {
        const T term = z[i] * widen(product[i]);
        sum[i] = a.first ? term : sum[i] + term;
        if (a.divisor != 1) sum[i] /= divisor;
      }
      store<Reuse::kSoon>(sum, at.length, vectors, estimate);
    }
  }
}

void hutchinson(const Target& target, const Estimate& e) {
  with_dtype(e.products.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    const auto kernel = hutchinson_kernel<P>;
    for_each_table<SignTable>(
        e.numel, &e.offsets,
        [&](SignTable& table, int entry, int64_t i) {
          if (i >= 0) table.data[0][entry] = e.products.data[i];
          table.index[entry] = i >= 0 ? e.signs.indices[i] : 0;
        },
        [&](const SignTable& table, int64_t origin) {
          launch_over_table(target, kernel,
                            HutchinsonArguments{table,
                                                {e.signs.seed, e.signs.evaluation, e.signs.sample},
                                                static_cast<Compute<P>*>(e.estimate) + origin,
                                                e.first,
                                                e.divisor});
        });
  });
}

}  // namespace sassha::cuda
