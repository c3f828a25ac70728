// update_: exp_avg, exp_hessian (on a Hessian step) and the weights in one pass. Moves 24 bytes per float32 element on
// a lazy step, 32 on a Hessian step, 28 where gradients are what exp_hessian averages, and 20 where there is none; with
// exp_hessian by blocks 20 and little more.
//
// Two launches: inspect_kernel (inspect.cu) looks for what is not finite and works out what a step needs once;
// update_kernel reads its findings. So nothing is written before everything was read, and the host waits for nothing.
// A third one, of a single block, where the norm of exp_avg is asked for, whose squares update_kernel sums on the way.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/blocks.h"
#include "cuda/inspect.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/reduce.h"
#include "cuda/sums.h"
#include "cuda/vectors.h"
#include "math/sassha.h"

namespace sassha::cuda {

// In place of the dtype of products: exp_hessian averages the squares of the gradients.
struct OfGradients {};

template <class H>
constexpr bool kHasProducts = !std::is_void_v<H> && !std::is_same_v<H, OfGradients>;

// H: what exp_hessian averages in this step: products of a dtype, OfGradients, or void: nothing.
template <class P, class H>
struct UpdateArguments {
  using T = Compute<P>;
  using AnyTable = RowTable<kHasProducts<H> ? 3 : 2>;
  AnyTable table;   // params, grads and, on a Hessian step, products
  const P* backup;  // this and the next three: where the table's first unit lies; or null, and w is in params
  T* exp_avg;
  T* exp_hessian;     // null of a plain direction
  const T* averaged;  // what takes the place of exp_hessian, or null
  Blocks blocks;      // of both
  int64_t* steps;
  int64_t* skipped;
  const Prepared<T>* prepared;
  const double* norm;  // or null
  double* sums;        // the findings, and behind them room for the squares of exp_avg, a sum for each block
  int32_t finding_count;
  int32_t begun;  // the number of blocks that have a sum of an earlier table, to which they add
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

// w, in place of what params were moved to along exp_avg; of narrow parameters, which would be rounded twice, a copy is
// kept instead.
template <class P, class T, int kCount>
__device__ __forceinline__ void unperturb(P (&w)[kCount], const T (&m)[kCount], const UpdateScalars<T>& scalars) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) w[i] = unperturbed(w[i], m[i], scalars.perturbation);
}

// params <- w: the backup, or what can be worked out from params.
template <class P, class H>
__device__ void restore(const UpdateArguments<P, H>& a) {
  using T = Compute<P>;
  for (Chunks<P, typename UpdateArguments<P, H>::AnyTable> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
      if (at.length == 0) continue;
      P* const weights = a.table.template tensor<P>(0, at.entry) + at.element;
      const P* const old = a.backup != nullptr ? a.backup + at.flat : weights;
      const T* const exp_avg = a.exp_avg + at.flat;
      const bool vectors = at.template whole<P>() && aligned(weights, old, exp_avg);
      P w[kVector<P>];
      load<Reuse::kLate>(old, at.length, vectors, w);
      if constexpr (std::is_same_v<P, T>) {
        if (a.backup == nullptr) {
          T m[kVector<P>];
          load<Reuse::kLate>(exp_avg, at.length, vectors, m);
          unperturb(w, m, a.prepared[a.table.row[at.entry]].scalars);
        }
      }
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
  }
}

// The squares of exp_avg that are this block's, summed in float64.
template <class P, class H>
__device__ double squares_in_float64(const UpdateArguments<P, H>& a) {
  double sum = 0;
  for (Chunks<P, typename UpdateArguments<P, H>::AnyTable> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int j = 0; j < kVectorsPerChunk<P>; ++j) {
      const Place at = chunks.place(j);
#pragma unroll 1
      for (int i = 0; i < at.length; ++i) {
        const double m = a.exp_avg[at.flat + i];
        sum = std::fma(m, m, sum);
      }
    }
  }
  return block_sum(sum);
}

// kNorm: whether the squares of exp_avg are summed as well.
template <class P, class H, Kind kKind, bool kNorm>
__device__ __forceinline__ void take_step(const UpdateArguments<P, H>& a) {
  using T = Compute<P>;
  constexpr bool kSecond = !std::is_void_v<H>;
  using Product = std::conditional_t<kHasProducts<H>, H, P>;
  using AnyTable = typename UpdateArguments<P, H>::AnyTable;
  // The state of narrow parameters is wider than they are: one vector of it at a time, and of what is as wide, spares
  // registers.
  constexpr bool kWide = sizeof(Product) > sizeof(P);

  const bool finite = std::isfinite(block_sum(a.sums, a.finding_count));
  const bool moved_along = std::is_same_v<P, T> && unperturbs(a.norm);
  record(a, finite);
  if (!finite) {
    if (a.backup != nullptr || moved_along) restore(a);
    return;
  }
  // Then exp_hessian is read, and where it has been averaged written, one by one.
  const bool by_blocks = !kSecond && (a.averaged != nullptr || a.blocks.shift > 0);
  int entry = -1;
  UpdateScalars<T> scalars;
  [[maybe_unused]] RunningSquares<T> squares;
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
      bool vectors = at.template whole<P>() && aligned(weights, old, gradients, exp_avg);
      if (kKind != Kind::kPlain) vectors = vectors && (by_blocks || aligned(exp_hessian));
      P g[kVector<P>];
      [[maybe_unused]] Product product[kVector<Product>];
      [[maybe_unused]] const Product* products = nullptr;
      if constexpr (kHasProducts<H>) {
        products = a.table.template tensor<const H>(2, at.entry) + at.element;
        vectors = vectors && aligned(products);
        if (!kWide) load<Reuse::kLate>(products, at.length, vectors, product);
      }
      load<Reuse::kLate>(old, at.length, vectors, w);
      load<Reuse::kLate>(gradients, at.length, vectors, g);
#pragma unroll
      for (int first = 0; first < kVector<P>; first += kVector<T>) {
        const int length = at.length - first;
        if (kWide) load<Reuse::kLate>(products + first, length, vectors, product);
        T m[kVector<T>], D[kVector<T>];
        load<Reuse::kLate>(exp_avg + first, length, vectors, m);
        if constexpr (std::is_same_v<P, T>) {
          if (moved_along) unperturb(w, m, scalars);
        }
        if constexpr (kKind != Kind::kPlain) {
          if (by_blocks) {
            const T* const from = a.averaged != nullptr ? a.averaged : a.exp_hessian;
            const Shared shared(a.blocks, at.flat + first);
            load_shared(from, shared, length, D);
            if (a.averaged != nullptr) store_shared(D, shared, length, a.exp_hessian);
          } else {
            load<Reuse::kLate>(exp_hessian + first, length, vectors, D);
          }
        }
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          P& weight = w[first + i];
          const T gradient = widen(g[first + i]);
          T hessian = gradient;
          if constexpr (kHasProducts<H>) hessian = widen(product[kWide ? i : first + i]);
          weight =
              narrow<P>(updated<T, kKind, kSecond>(widen(weight), gradient, hessian, m[i], D[i], a.constants, scalars));
        }
        store<Reuse::kLate>(m, length, vectors, exp_avg + first);
        if constexpr (kSecond) store<Reuse::kLate>(D, length, vectors, exp_hessian + first);
        if constexpr (kNorm) {
          // Behind a tensor's end m is 0, as everything that was read for it.
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) squares.add(m[i]);
        }
      }
      store<Reuse::kSoon>(w, at.length, vectors, weights);
    }
    if constexpr (kNorm) squares.normalize();
  }
  if constexpr (kNorm) {
    const double share = squares.share([&] { return squares_in_float64(a); });
    double* const sum = a.sums + a.finding_count + blockIdx.x;
    if (threadIdx.x == 0) *sum = share + (blockIdx.x < a.begun ? *sum : 0);
  }
}

// How many blocks a multiprocessor must have registers for: 64 a thread. With the sum narrow parameters take more, but
// each of their threads has half as many bytes again on their way.
constexpr int kUpdateBlocks = 4;
template <class P>
constexpr int kSquaresBlocks = sizeof(P) < sizeof(Compute<P>) ? 3 : kUpdateBlocks;

template <class P, class H, Kind kKind>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    update_kernel(const __grid_constant__ UpdateArguments<P, H> a) {
  take_step<P, H, kKind, false>(a);
}

template <class P, class H, Kind kKind>
__global__ void __launch_bounds__(kThreads, kSquaresBlocks<P>)
    update_and_squares_kernel(const __grid_constant__ UpdateArguments<P, H> a) {
  take_step<P, H, kKind, true>(a);
}

namespace {

// Starts a kernel over every table; returns how many blocks have left a sum behind the findings.
template <class P, class H>
int64_t update_by(void (*kernel)(UpdateArguments<P, H>), const Target& target, const Update& u, const Tensors* products,
                  const PartialSums& findings) {
  using T = Compute<P>;
  using AnyTable = typename UpdateArguments<P, H>::AnyTable;
  const Blocks blocks = blocks_of(u.settings, u.blocked);
  int32_t begun = 0;
  for_each_table<AnyTable>(
      u.numel, &u.offsets,
      [&](AnyTable& table, int entry, int64_t i) {
        table.set_row(entry, i, u.rows);
        if (i < 0) return;
        table.data[0][entry] = u.params.data[i];
        table.data[1][entry] = u.grads.data[i];
        if constexpr (kHasProducts<H>) table.data[2][entry] = products->data[i];
      },
      [&](const AnyTable& table, int64_t origin) {
        const int64_t start = blocks.index(origin);
        UpdateArguments<P, H> arguments;
        arguments.table = table;
        arguments.backup = u.backup ? static_cast<const P*>(u.backup) + origin : nullptr;
        arguments.exp_avg = static_cast<T*>(u.exp_avg) + origin;
        arguments.exp_hessian = u.exp_hessian ? static_cast<T*>(u.exp_hessian) + start : nullptr;
        arguments.averaged = u.averaged ? static_cast<const T*>(u.averaged) + start : nullptr;
        arguments.blocks = blocks_from(blocks, origin);
        arguments.steps = u.steps;
        arguments.skipped = u.skipped;
        arguments.prepared = static_cast<const Prepared<T>*>(u.scratch);
        arguments.norm = u.norm;
        arguments.sums = findings.sums;
        arguments.finding_count = static_cast<int32_t>(findings.count);
        arguments.begun = begun;
        arguments.constants = update_constants<T>(u.settings);
        const int launched = blocks_for(target, kernel, table.first_unit[table.count]);
        launch(target, kernel, launched, arguments);
        begun = std::max(begun, launched);
      });
  return begun;
}

template <class P, class H, Kind kKind>
void update_as(const Target& target, const Update& u, const Tensors* products, const PartialSums& findings) {
  // The norm of exp_avg comes with a step that has no products, and of no method that is perturbed along the gradient.
  if constexpr (!kHasProducts<H> && kKind != Kind::kClipped) {
    if (u.exp_avg_norm != nullptr) {
      const int64_t count = update_by(update_and_squares_kernel<P, H, kKind>, target, u, products, findings);
      return finish_norm(target, {findings.sums + findings.count, count}, u.exp_avg_norm, u.skipped);
    }
  }
  update_by(update_kernel<P, H, kKind>, target, u, products, findings);
}

template <class P, class H>
void update_with(const Target& target, const Update& u, const Tensors* products, const PartialSums& findings) {
  switch (kind_of(u.settings)) {
    case Kind::kSquareRoot:
      return update_as<P, H, Kind::kSquareRoot>(target, u, products, findings);
    case Kind::kIdentity:
      return update_as<P, H, Kind::kIdentity>(target, u, products, findings);
    case Kind::kGeneral:
      return update_as<P, H, Kind::kGeneral>(target, u, products, findings);
    case Kind::kClipped:
      return update_as<P, H, Kind::kClipped>(target, u, products, findings);
    case Kind::kPlain:
      return update_as<P, void, Kind::kPlain>(target, u, products, findings);
  }
}

}  // namespace

int64_t most_block_sums(const Target& target) { return most_blocks(target); }

void update(const Target& target, const Update& u) {
  const PartialSums findings = inspect(target, u);
  with_dtype(u.params.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    const bool of_gradients = !u.products && !u.averaged && averages_second(u.settings, false);
    // No member of the family takes another power of them: gradients come twice then, the second time as products.
    if (of_gradients && kind_of(u.settings) != Kind::kSquareRoot)
      return update_with<P, P>(target, u, &u.grads, findings);
    if (of_gradients) return update_as<P, OfGradients, Kind::kSquareRoot>(target, u, nullptr, findings);
    if (!u.products) return update_with<P, void>(target, u, nullptr, findings);
    // Means over several samples come in the compute type.
    if (u.products->dtype == u.params.dtype) return update_with<P, P>(target, u, &*u.products, findings);
    update_with<P, Compute<P>>(target, u, &*u.products, findings);
  });
}

}  // namespace sassha::cuda
