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

// What the elements of one parameter share in this step, and its counts behind it.
struct Prepared {
  UpdateScalars scalars;
  int64_t step;
  int64_t hessian_step;
};

constexpr int kGuards = 4;

// What is done once, beside reading the gradients: guards looked at, and every row of the counts prepared.
struct Chores {
  Scalar guards[kGuards];
  int guard_count;
  bool hessian_step;
  Hyperparameters hyperparameters;
  Scalar lr_tensor;  // in place of hyperparameters.lr, unless null
  const int64_t* steps;
  int64_t rows;
  Prepared* prepared;
};

struct InspectArguments {
  Table<1> table;   // gradients or products
  double* partial;  // one per block; not finite where anything is not
  Chores chores;
};

__device__ inline void prepare(const Chores& chores) {
  Hyperparameters hyperparameters = chores.hyperparameters;
  if (chores.lr_tensor.data != nullptr) hyperparameters.lr = value_of(chores.lr_tensor);
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < chores.rows;
       row += int64_t{gridDim.x} * kThreads) {
    const int64_t step = chores.steps[2 * row] + 1;
    int64_t hessian_step = chores.steps[2 * row + 1];
    if (chores.hessian_step) hessian_step = next_hessian_step(hyperparameters.bias_correction, step, hessian_step);
    chores.prepared[row] = {update_scalars(hyperparameters, step, hessian_step), step, hessian_step};
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) inspect_kernel(const __grid_constant__ InspectArguments a) {
  prepare(a.chores);
  double sum = share_of_findings<P>(a.table);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    for (int i = 0; i < a.chores.guard_count; ++i) {
      const double guard = value_of(a.chores.guards[i]);
      if (!std::isfinite(guard)) sum = guard;
    }
  }
  a.partial[blockIdx.x] = sum;
}

template <int kLists>
struct UpdateTable : Table<kLists, sizeof(int32_t)> {
  int32_t row[Table<kLists, sizeof(int32_t)>::kCapacity];  // of the counts; -1 for a gap
};

// H: the dtype of the products, void on a lazy step.
template <class H>
struct UpdateArguments {
  static constexpr int kLists = std::is_void_v<H> ? 2 : 3;
  UpdateTable<kLists> table;  // params, grads and, on a Hessian step, products
  const void* backup;         // this and the next two: where the table's first unit lies
  void* exp_avg;
  void* exp_hessian;
  int64_t* steps;
  int64_t* skipped;
  const Prepared* prepared;
  const double* partial;
  int64_t partial_count;
  UpdateConstants constants;
};

template <class H>
__device__ void record(const UpdateArguments<H>& a, bool finite) {
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
__device__ void restore(const UpdateArguments<H>& a) {
  for (Chunks<P, UpdateTable<UpdateArguments<H>::kLists>> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      P* const weights = a.table.template tensor<P>(0, at.entry) + at.element;
      const P* const backup = static_cast<const P*>(a.backup) + at.flat;
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
__global__ void __launch_bounds__(kThreads, kUpdateBlocks) update_kernel(const __grid_constant__ UpdateArguments<H> a) {
  using T = Compute<P>;
  constexpr bool kHessianStep = !std::is_void_v<H>;
  using Product = std::conditional_t<kHessianStep, H, P>;
  using AnyTable = UpdateTable<UpdateArguments<H>::kLists>;

  const bool finite = std::isfinite(block_sum(a.partial, a.partial_count));
  record(a, finite);
  if (!finite) return restore<P>(a);
  int entry = -1;
  UpdateScalars scalars;
  for (Chunks<P, AnyTable> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      if (at.length == 0) continue;
      P* const weights = a.table.template tensor<P>(0, at.entry) + at.element;
      const P* const backup = static_cast<const P*>(a.backup) + at.flat;
      P w[kVector<P>];
      if (at.entry != entry) {
        entry = at.entry;
        scalars = a.prepared[a.table.row[entry]].scalars;
      }
      const P* const gradients = a.table.template tensor<const P>(1, at.entry) + at.element;
      T* const exp_avg = static_cast<T*>(a.exp_avg) + at.flat;
      T* const exp_hessian = static_cast<T*>(a.exp_hessian) + at.flat;
      bool vectors = at.whole<P>() && aligned(weights, backup, gradients, exp_avg, exp_hessian);
      P g[kVector<P>];
      [[maybe_unused]] Product product[kVector<P>];
      if constexpr (kHessianStep) {
        const H* const products = a.table.template tensor<const H>(2, at.entry) + at.element;
        vectors = vectors && aligned(products);
        load<Reuse::kLate>(products, at.length, vectors, product);
      }
      load<Reuse::kLate>(backup, at.length, vectors, w);
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
  chores.hessian_step = u.products != nullptr;
  chores.hyperparameters = u.hyperparameters;
  if (u.lr_tensor) chores.lr_tensor = *u.lr_tensor;
  chores.steps = u.steps;
  chores.rows = u.step_rows;
  chores.prepared = static_cast<Prepared*>(u.scratch);
  std::vector<Scalar> guards = u.guards;
  const std::vector<int64_t> none;
  inspect(target, u.guard_grads ? u.numel : none, u.grads, chores, guards, partial);
  if (u.guard_grads && u.products) inspect(target, u.numel, *u.products, chores, guards, partial);
  while (!guards.empty()) inspect(target, none, u.grads, chores, guards, partial);
  return partial;
}

template <class P, class H, Power kPower>
void update_as(const Target& target, const Update& u, const PartialSums& partial) {
  constexpr int kLists = UpdateArguments<H>::kLists;
  using T = Compute<P>;
  const auto kernel = update_kernel<P, H, kPower>;
  for_each_table<UpdateTable<kLists>>(
      u.numel, &u.offsets,
      [&](UpdateTable<kLists>& table, int entry, int64_t i) {
        table.row[entry] = i < 0 ? -1 : static_cast<int32_t>(u.rows[i]);
        if (i < 0) return;
        table.data[0][entry] = u.params.data[i];
        table.data[1][entry] = u.grads.data[i];
        if constexpr (kLists == 3) table.data[2][entry] = u.products->data[i];
      },
      [&](const UpdateTable<kLists>& table, int64_t origin) {
        launch_over_table(target, kernel,
                          UpdateArguments<H>{
                              table,
                              static_cast<const P*>(u.backup) + origin,
                              static_cast<T*>(u.exp_avg) + origin,
                              static_cast<T*>(u.exp_hessian) + origin,
                              u.steps,
                              u.skipped,
                              static_cast<const Prepared*>(u.scratch),
                              partial.sums,
                              partial.count,
                              update_constants(u.hyperparameters),
                          });
      });
}

template <class P, class H>
void update_with(const Target& target, const Update& u, const PartialSums& partial) {
  switch (power_of(u.hyperparameters.hessian_power)) {
    case Power::kSquareRoot:
      return update_as<P, H, Power::kSquareRoot>(target, u, partial);
    case Power::kIdentity:
      return update_as<P, H, Power::kIdentity>(target, u, partial);
    case Power::kGeneral:
      return update_as<P, H, Power::kGeneral>(target, u, partial);
  }
}

}  // namespace

int64_t scratch_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(Prepared)); }

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
