// update_: exp_avg, exp_hessian (on a Hessian step) and the weights in one pass. Moves 24 bytes per float32 element on
// a lazy step, 32 on a Hessian step.
//
// Two launches: inspect_kernel looks for what is not finite and works out what a step needs once; update_kernel reads
// its findings. So nothing is written before everything was read, and the host waits for nothing.

#include <cmath>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sums.h"
#include "math/sassha.h"

namespace sassha::cuda {

// What the elements of one parameter share in this step, and its counts behind it. T: the compute type.
template <class T>
struct Prepared {
  UpdateScalars<T> scalars;
  int64_t step;
  int64_t hessian_step;
};

constexpr int kGuards = 4;

// What is done once, beside reading the gradients: guards looked at, and every row of the counts prepared.
struct Chores {
  Scalar guards[kGuards];
  int guard_count;
  bool hessian_step;
  Settings settings;
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
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < chores.rows;
       row += int64_t{gridDim.x} * kThreads) {
    const int64_t step = chores.steps[2 * row] + 1;
    int64_t hessian_step = chores.steps[2 * row + 1];
    if (chores.hessian_step) hessian_step = next_hessian_step(chores.settings, step, hessian_step);
    const auto scalars = update_scalars<T>(chores.settings, chores.per_row[row], step, hessian_step);
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

// H: the dtype of the products, void on a lazy step.
template <class P, class H>
struct UpdateArguments {
  using T = Compute<P>;
  using AnyTable = RowTable<std::is_void_v<H> ? 2 : 3>;
  AnyTable table;   // params, grads and, on a Hessian step, products
  const P* backup;  // this and the next two: where the table's first unit lies; or null, and w is in params
  T* exp_avg;
  T* exp_hessian;
  int64_t* steps;
  int64_t* skipped;
  const Prepared<T>* prepared;
  const double* partial;
  int64_t partial_count;
  UpdateConstants<T> constants;
};

template <class P, class H>
__device__ void record(const UpdateArguments<P, H>& a, bool finite) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.skipped = finite ? 0 : 1;
  if (!finite) return;
  for (int entry = blockIdx.x * kThreads + threadIdx.x; entry < a.table.count; entry += gridDim.x * kThreads) {
    const int64_t row = a.table.row[entry];
    if (row < 0) continue;
    a.steps[2 * row] = a.prepared[row].step;
    a.steps[2 * row + 1] = a.prepared[row].hessian_step;
  }
}

// params <- backup
template <class P, class H>
__device__ void restore(const UpdateArguments<P, H>& a) {
  for (Chunks<P, typename UpdateArguments<P, H>::AnyTable> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      P* const weights = a.table.template tensor<P>(0, at.entry) + at.element;
      const P* const backup = a.backup + at.flat;
      const bool vectors = at.template whole<P>() && aligned(weights, backup);
      P w[kVector<P>];
      load<Reuse::kLate>(backup, at.length, vectors, w);
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
  }
}

// How many blocks a multiprocessor must have registers for: 64 a thread.
constexpr int kUpdateBlocks = 4;

template <class P, class H, Power kPower>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    update_kernel(const __grid_constant__ UpdateArguments<P, H> a) {
  using T = Compute<P>;
  constexpr bool kHessianStep = !std::is_void_v<H>;
  using Product = std::conditional_t<kHessianStep, H, P>;
  using AnyTable = typename UpdateArguments<P, H>::AnyTable;

  const bool finite = std::isfinite(block_sum(a.partial, a.partial_count));
  record(a, finite);
  if (!finite) {
    if (a.backup != nullptr) restore(a);
    return;
  }
  int entry = -1;
  UpdateScalars<T> scalars;
  for (Chunks<P, AnyTable> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      if (at.length == 0) continue;
      P* const weights = a.table.template tensor<P>(0, at.entry) + at.element;
      const P* const old = a.backup != nullptr ? a.backup + at.flat : weights;
      P w[kVector<P>];
      if (at.entry != entry) {
        entry = at.entry;
        scalars = a.prepared[a.table.row[entry]].scalars;
      }
      const P* const gradients = a.table.template tensor<const P>(1, at.entry) + at.element;
      T* const exp_avg = a.exp_avg + at.flat;
      T* const exp_hessian = a.exp_hessian + at.flat;
      bool vectors = at.template whole<P>() && aligned(weights, old, gradients, exp_avg, exp_hessian);
      P g[kVector<P>];
      [[maybe_unused]] Product product[kVector<P>];
      if constexpr (kHessianStep) {
        const H* const products = a.table.template tensor<const H>(2, at.entry) + at.element;
        vectors = vectors && aligned(products);
        load<Reuse::kLate>(products, at.length, vectors, product);
      }
      load<Reuse::kLate>(old, at.length, vectors, w);
      load<Reuse::kLate>(gradients, at.length, vectors, g);
      // The state of narrow parameters is wider than they are: one vector of it at a time spares registers.
#pragma unroll
      for (int first = 0; first < kVector<P>; first += kVector<T>) {
        const int length = at.length - first;
        T m[kVector<T>], D[kVector<T>];
        load<Reuse::kLate>(exp_avg + first, length, vectors, m);
        load<Reuse::kLate>(exp_hessian + first, length, vectors, D);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          P& weight = w[first + i];
          m[i] = averaged_gradient<T>(m[i], widen(g[first + i]), a.constants);
          if constexpr (kHessianStep) D[i] = averaged_hessian<T>(D[i], widen(product[first + i]), a.constants);
          weight = narrow<P>(updated<T, kPower>(widen(weight), m[i], D[i], a.constants, scalars));
        }
        store<Reuse::kLate>(m, length, vectors, exp_avg + first);
        if constexpr (kHessianStep) store<Reuse::kLate>(D, length, vectors, exp_hessian + first);
      }
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
  }
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

// Looks at everything that must be finite, and prepares the rows of the counts.
PartialSums inspect(const Target& target, const Update& u) {
  PartialSums partial{u.partial.sums, 0};
  Chores chores{};
  chores.hessian_step = u.products.has_value();
  chores.settings = u.settings;
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

template <class P, class H, Power kPower>
void update_as(const Target& target, const Update& u, const PartialSums& partial) {
  using T = Compute<P>;
  using AnyTable = typename UpdateArguments<P, H>::AnyTable;
  const auto kernel = update_kernel<P, H, kPower>;
  for_each_table<AnyTable>(
      u.numel, &u.offsets,
      [&](AnyTable& table, int entry, int64_t i) {
        table.set_row(entry, i, u.rows);
        if (i < 0) return;
        table.data[0][entry] = u.params.data[i];
        table.data[1][entry] = u.grads.data[i];
        if constexpr (!std::is_void_v<H>) table.data[2][entry] = u.products->data[i];
      },
      [&](const AnyTable& table, int64_t origin) {
        UpdateArguments<P, H> arguments;
        arguments.table = table;
        arguments.backup = u.backup ? static_cast<const P*>(u.backup) + origin : nullptr;
        arguments.exp_avg = static_cast<T*>(u.exp_avg) + origin;
        arguments.exp_hessian = static_cast<T*>(u.exp_hessian) + origin;
        arguments.steps = u.steps;
        arguments.skipped = u.skipped;
        arguments.prepared = static_cast<const Prepared<T>*>(u.scratch);
        arguments.partial = partial.sums;
        arguments.partial_count = partial.count;
        arguments.constants = update_constants<T>(u.settings);
        launch_over_table(target, kernel, arguments);
      });
}

template <class P, class H>
void update_with(const Target& target, const Update& u, const PartialSums& partial) {
  switch (power_of(u.settings.hessian_power)) {
    case Power::kSquareRoot:
      return update_as<P, H, Power::kSquareRoot>(target, u, partial);
    case Power::kIdentity:
      return update_as<P, H, Power::kIdentity>(target, u, partial);
    case Power::kGeneral:
      return update_as<P, H, Power::kGeneral>(target, u, partial);
  }
}

}  // namespace

// Of double, which takes the most.
int64_t scratch_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(Prepared<double>)); }

void update(const Target& target, const Update& u) {
  const PartialSums partial = inspect(target, u);
  with_dtype(u.params.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if (!u.products) return update_with<P, void>(target, u, partial);
    // Means over several samples come in the compute type.
    if (u.products->dtype == u.params.dtype) return update_with<P, P>(target, u, partial);
    update_with<P, Compute<P>>(target, u, partial);
  });
}

}  // namespace sassha::cuda
