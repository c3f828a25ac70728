// grad_norm: ||g||, or || |w| . g ||. Reads 4 bytes per float32 element (8 with w).

#include <cmath>

#include "cuda/launch.h"
#include "cuda/sums.h"

namespace sassha::cuda {

template <int kLists>
struct SquaresArguments {
  Table<kLists> table;
  double* partial;  // one per block
};

template <class P, int kLists>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ SquaresArguments<kLists> a) {
  const double sum = share_of_squares<P>(a.table);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

struct NormArguments {
  const double* partial;
  int64_t count;
  double* norm;
  const int64_t* skipped;  // or null: where not 0 the norm stays what it was
};

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArguments a) {
  if (a.skipped != nullptr && *a.skipped != 0) return;
  const double sum = block_sum(a.partial, a.count);
  if (threadIdx.x == 0) *a.norm = std::sqrt(sum);
}

namespace {

template <class P, int kLists>
void sum_lists(const Target& target, const std::vector<int64_t>& numel, const Tensors* const (&lists)[kLists],
               PartialSums& partial) {
  for_each_table<Table<kLists>>(
      numel, nullptr,
      [&](Table<kLists>& table, int entry, int64_t i) {
        for (int list = 0; list < kLists; ++list) table.data[list][entry] = lists[list]->data[i];
      },
      [&](const Table<kLists>& table, int64_t) {
        const int blocks = blocks_for(target, squares_kernel<P, kLists>, table.first_unit[table.count]);
        launch(target, squares_kernel<P, kLists>, blocks,
               SquaresArguments<kLists>{table, partial.sums + partial.count});
        partial.count += blocks;
      });
}

}  // namespace

int64_t most_partial_sums(const Target& target, const std::vector<int64_t>& numel) {
  const int64_t tables = static_cast<int64_t>(numel.size()) / Table<2>::kCapacity + 1;
  return tables * most_blocks(target);
}

void sum_squares(const Target& target, const std::vector<int64_t>& numel, const Tensors& grads, const Tensors* weights,
                 PartialSums& partial) {
  with_dtype(grads.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if (weights) {
      sum_lists<P, 2>(target, numel, {&grads, weights}, partial);
    } else {
      sum_lists<P, 1>(target, numel, {&grads}, partial);
    }
  });
}

void finish_norm(const Target& target, const PartialSums& partial, double* norm, const int64_t* skipped) {
  launch(target, norm_kernel, 1, NormArguments{partial.sums, partial.count, norm, skipped});
}

}  // namespace sassha::cuda
