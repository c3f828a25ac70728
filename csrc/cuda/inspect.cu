// update_, its first launch: looks for what is not finite, and works out what a step needs once.

#include <algorithm>

#include "cuda/inspect.h"
#include "cuda/launch.h"
#include "cuda/sums.h"
#include "math/sassha.h"

namespace sassha::cuda {

constexpr int kGuards = 4;

// What is done once, beside reading the gradients: guards looked at, and every row of the counts prepared.
struct Chores {
  Scalar guards[kGuards];
  int guard_count;
  bool second;  // whether exp_hessian is written
  Settings settings;
  const double* norm;  // or null
  const int64_t* steps;
  const RowSettings* per_row;
  int64_t rows;
  void* prepared;  // Prepared<T>[rows]
};

struct InspectArguments {
  Table<1> table;   // gradients or products
  double* partial;  // one per block; not finite where anything is not
  Chores chores;
};

template <class T>
__device__ void prepare(const Chores& chores) {
  Prepared<T>* const prepared = static_cast<Prepared<T>*>(chores.prepared);
  const double inverse = unperturbs(chores.norm) ? inverse_norm(*chores.norm) : 0;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < chores.rows;
       row += int64_t{gridDim.x} * kThreads) {
    const int64_t step = chores.steps[2 * row] + 1;
    int64_t hessian_step = chores.steps[2 * row + 1];
    if (chores.second) hessian_step = next_hessian_step(chores.settings, step, hessian_step);
    const auto scalars = update_scalars<T>(chores.settings, chores.per_row[row], inverse, step, hessian_step);
    prepared[row] = {scalars, step, hessian_step};
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) inspect_kernel(const __grid_constant__ InspectArguments a) {
  double sum = share_of_findings<P>(a.table);
  prepare<Compute<P>>(a.chores);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    for (int i = 0; i < a.chores.guard_count; ++i) {
      const double guard = value_of(a.chores.guards[i]);
      if (!std::isfinite(guard)) sum = guard;
    }
  }
  a.partial[blockIdx.x] = sum;
}

namespace {

// Looks at tensors and as many guards as these launches take; the others are left in guards.
void inspect(const Target& target, const std::vector<int64_t>& numel, const Tensors& tensors, Chores& chores,
             std::vector<Scalar>& guards, PartialSums& partial) {
  with_dtype(tensors.dtype, [&](auto type) {
    const auto kernel = inspect_kernel<typename decltype(type)::type>;
    for_each_table<Table<1>>(
        numel, nullptr, [&](Table<1>& table, int entry, int64_t i) { table.data[0][entry] = tensors.data[i]; },
        [&](const Table<1>& table, int64_t) {
          chores.guard_count = 0;
          for (; !guards.empty() && chores.guard_count < kGuards; guards.pop_back()) {
            chores.guards[chores.guard_count++] = guards.back();
          }
          // Rows are many threads' work too, where there are few elements or none.
          const int64_t units = std::max(int64_t{table.first_unit[table.count]}, chores.rows / (kWarp / kChunkUnits));
          const int blocks = blocks_for(target, kernel, units);
          launch(target, kernel, blocks, InspectArguments{table, partial.sums + partial.count, chores});
          partial.count += blocks;
          chores.rows = 0;
        });
  });
}

}  // namespace

PartialSums inspect(const Target& target, const Update& u) {
  PartialSums partial{u.partial.sums, 0};
  Chores chores{};
  chores.second = averages_second(u.settings, u.products || u.averaged);
  chores.settings = u.settings;
  chores.norm = u.norm;
  chores.steps = u.steps;
  chores.per_row = u.per_row;
  chores.rows = u.row_count;
  chores.prepared = u.scratch;
  std::vector<Scalar> guards = u.guards;
  const std::vector<int64_t> none;
  inspect(target, u.guard_grads ? u.numel : none, u.grads, chores, guards, partial);
  if (u.guard_grads && u.products) inspect(target, u.numel, *u.products, chores, guards, partial);
  while (!guards.empty()) inspect(target, none, u.grads, chores, guards, partial);
  return partial;
}

// Of double, which takes the most.
int64_t scratch_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(Prepared<double>)); }

}  // namespace sassha::cuda
