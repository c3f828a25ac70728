// perturb_: backup <- w, w <- w + eps* where the norm is finite. Moves 16 bytes per float32 element, 12 without a
// backup.

#include <cmath>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/vectors.h"
#include "math/sassha.h"

namespace sassha::cuda {

struct PerturbArguments {
  RowTable<2> table;  // params, grads
  void* backup;       // where the table's first unit lies, or null
  double* norm;
  const double* partial;
  int64_t partial_count;
  const RowSettings* per_row;
  Settings settings;
};

struct Norm {
  double value;
  double inverse;
};

// To every thread of the block. Every block finishes the norm for itself, all to the same bits: a launch of its own
// would take longer. One thread does: a root and a division are many instructions where float64 units are few.
__device__ inline Norm norm_of(const PerturbArguments& a) {
  __shared__ Norm norm;
  const bool measured = a.partial_count > 0;
  const double sum = measured ? block_sum(a.partial, a.partial_count) : 0;
  if (threadIdx.x == 0) {
    norm.value = measured ? std::sqrt(sum) : *a.norm;
    norm.inverse = inverse_norm(norm.value);
    if (measured && blockIdx.x == 0) *a.norm = norm.value;
  }
  __syncthreads();
  return norm;
}

// G: the dtype of what eps* points along, that of the weights or of their state.
template <class P, class G, bool kAdaptive>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ PerturbArguments a) {
  using T = Compute<P>;
  // Of each entry, once a block: every thread at every entry that it comes to would be a hundred times as much float64.
  __shared__ T scales[RowTable<2>::kCapacity];
  const Norm norm = norm_of(a);
  // Shared, or the compiler asks the float64 number once more for each vector.
  __shared__ bool finite;
  if (threadIdx.x == 0) finite = std::isfinite(norm.value);
  for (int entry = threadIdx.x; entry < a.table.count; entry += kThreads) {
    const int64_t row = a.table.row[entry];
    if (row >= 0) scales[entry] = perturbation_scale<T>(a.per_row[row].rho, norm.inverse, a.settings);
  }
  __syncthreads();
  for (Chunks<P, RowTable<2>> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      if (at.length == 0) continue;
      P* const weights = a.table.tensor<P>(0, at.entry) + at.element;
      const G* const gradients = a.table.tensor<const G>(1, at.entry) + at.element;
      P* const backup = a.backup != nullptr ? static_cast<P*>(a.backup) + at.flat : nullptr;
      const bool vectors = at.whole<P>() && aligned(weights, gradients, backup);
      P w[kVector<P>];
      G g[kVector<P>];
      load<Reuse::kSoon>(weights, at.length, vectors, w);
      load<Reuse::kLate>(gradients, at.length, vectors, g);
      if (backup != nullptr) store<Reuse::kLate>(w, at.length, vectors, backup);
      if (!finite) continue;
#pragma unroll
      for (int i = 0; i < kVector<P>; ++i) {
        w[i] = narrow<P>(perturbed<T, kAdaptive>(widen(w[i]), widen(g[i]), scales[at.entry]));
      }
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
  }
}

void perturb(const Target& target, const Perturbation& p) {
  with_dtype(p.params.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    const auto kernel = p.grads.dtype != p.params.dtype ? perturb_kernel<P, Compute<P>, false>
                        : p.settings.adaptive != 0      ? perturb_kernel<P, P, true>
                                                        : perturb_kernel<P, P, false>;
    for_each_table<RowTable<2>>(
        p.numel, &p.offsets,
        [&](RowTable<2>& table, int entry, int64_t i) {
          table.set_row(entry, i, p.rows);
          if (i < 0) return;
          table.data[0][entry] = p.params.data[i];
          table.data[1][entry] = p.grads.data[i];
        },
        [&](const RowTable<2>& table, int64_t origin) {
          PerturbArguments arguments;
          arguments.table = table;
          arguments.backup = p.backup ? static_cast<P*>(p.backup) + origin : nullptr;
          arguments.norm = p.norm;
          arguments.partial = p.partial.sums;
          arguments.partial_count = p.partial.count;
          arguments.per_row = p.per_row;
          arguments.settings = p.settings;
          launch_over_table(target, kernel, arguments);
        });
  });
}

}  // namespace sassha::cuda
