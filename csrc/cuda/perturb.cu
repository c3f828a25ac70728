// perturb_: backup <- w, w <- w + eps* where the norm is finite. Moves 16 bytes per float32 element.

#include <cmath>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/vectors.h"
#include "math/sassha.h"

namespace sassha::cuda {

struct PerturbArguments {
  Table<2> table;  // params, grads
  void* backup;    // where the table's first unit lies
  double* norm;
  const double* partial;
  int64_t partial_count;
  double rho;
  bool maximize;
};

template <class P, bool kAdaptive>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ PerturbArguments a) {
  using T = Compute<P>;
  double norm;
  if (a.partial_count > 0) {
    // Every block finishes the norm for itself, all to the same bits: a launch of its own would take longer.
    norm = std::sqrt(block_sum(a.partial, a.partial_count));
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.norm = norm;
  } else {
    norm = *a.norm;
  }
  const bool finite = std::isfinite(norm);
  const T scale = perturbation_scale<T>(a.rho, norm, a.maximize);
  for (Chunks<P, Table<2>> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      if (at.length == 0) continue;
      P* const weights = a.table.tensor<P>(0, at.entry) + at.element;
      const P* const gradients = a.table.tensor<const P>(1, at.entry) + at.element;
      P* const backup = static_cast<P*>(a.backup) + at.flat;
      const bool vectors = at.whole<P>() && aligned(weights, gradients, backup);
      P w[kVector<P>], g[kVector<P>];
      load<Reuse::kSoon>(weights, at.length, vectors, w);
      load<Reuse::kLate>(gradients, at.length, vectors, g);
      store<Reuse::kLate>(w, at.length, vectors, backup);
      if (!finite) continue;
#pragma unroll
      for (int i = 0; i < kVector<P>; ++i) {
        w[i] = narrow<P>(perturbed<T, kAdaptive>(widen(w[i]), widen(g[i]), scale));
      }
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
  }
}

void perturb(const Target& target, const Perturbation& p) {
  with_dtype(p.params.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    const auto kernel = p.adaptive ? perturb_kernel<P, true> : perturb_kernel<P, false>;
    for_each_table<Table<2>>(
        p.numel, &p.offsets,
        [&](Table<2>& table, int entry, int64_t i) {
          if (i < 0) return;
          table.data[0][entry] = p.params.data[i];
          table.data[1][entry] = p.grads.data[i];
        },
        [&](const Table<2>& table, int64_t origin) {
          launch_over_table(target, kernel,
                            PerturbArguments{table, static_cast<P*>(p.backup) + origin, p.norm, p.partial.sums,
                                             p.partial.count, p.rho, p.maximize});
        });
  });
}

}  // namespace sassha::cuda
