// block_average_: averaged <- exp_hessian with the means of |products| over blocks averaged in. Reads 4 bytes per
// float32 element, and moves 8 per block.

#include <cmath>

#include "cuda/blocks.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/vectors.h"

namespace sassha::cuda {

template <class T>
struct BlockAverageArguments {
  Table<1> table;        // products
  const T* exp_hessian;  // this and the next: where the table's first unit lies
  T* averaged;
  Blocks blocks;
  UpdateConstants<T> constants;
};

// Of a thread: so many elements that a warp has whole units, and with them whole blocks.
template <class P>
constexpr int kElements = kVector<P> < kUnit / kWarp ? kUnit / kWarp : kVector<P>;

// averaged <- the averages of the blocks whose first element a thread has, of kCount elements from a place on.
template <class T, int kCount>
__device__ __forceinline__ void average_blocks(const BlockAverageArguments<T>& a, const Place& at, T (&sums)[kCount]) {
  const Shared shared(a.blocks, at.flat);
  const int block = shared.length();
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
    if (distance >= block) break;
#pragma unroll
    for (int i = 0; i < kCount; i += 2 * distance) sums[i] += sums[i + distance];
  }
  // All threads of a warp trade as long as any may: a shorter block is its own already.
  for (int distance = kCount; distance < 1 << a.blocks.shift; distance *= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, sums[0], distance / kCount);
    if (distance < block) sums[0] += other;
  }
  const int64_t left = at.length == 0 ? 0 : a.table.numel(at.entry) - at.element;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= at.length || !shared.starts(i)) continue;
    const int present = left - i < block ? static_cast<int>(left - i) : block;
    const T mean = sums[i] / static_cast<T>(present);
    a.averaged[shared.index(i)] = averaged_hessian(a.exp_hessian[shared.index(i)], mean, a.constants);
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads)
    block_average_kernel(const __grid_constant__ BlockAverageArguments<Compute<P>> a) {
  using T = Compute<P>;
  constexpr int kCount = kElements<P>, kEach = kChunk / (kWarp * kCount);
  // So many loads are on their way before the first is used.
  constexpr int kAhead = kEach < 4 * kVector<P> / kCount ? kEach : 4 * kVector<P> / kCount;
  for (Chunks<P, Table<1>, kCount> chunks(a.table); chunks.more(); chunks.next()) {
#pragma unroll 1
    for (int first = 0; first < kEach; first += kAhead) {
      Place at[kAhead];
      P products[kAhead][kCount];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        at[j] = chunks.place(first + j);
        const P* const from = a.table.template tensor<const P>(0, at[j].entry) + at[j].element;
        load<Reuse::kLate>(from, at[j].length, at[j].length == kCount && aligned(from), products[j]);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        T magnitudes[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) magnitudes[i] = std::fabs(widen(products[j][i]));
        average_blocks(a, at[j], magnitudes);
      }
    }
  }
}

void block_average(const Target& target, const BlockAverage& b) {
  const Blocks blocks = blocks_of(b.settings, b.blocked);
  with_dtype(b.products.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    using T = Compute<P>;
    for_each_table<Table<1>>(
        b.numel, &b.offsets,
        [&](Table<1>& table, int entry, int64_t i) {
          if (i >= 0) table.data[0][entry] = b.products.data[i];
        },
        [&](const Table<1>& table, int64_t origin) {
          const int64_t start = blocks.index(origin);
          const BlockAverageArguments<T> arguments{
              table,
              static_cast<const T*>(b.exp_hessian) + start,
              static_cast<T*>(b.averaged) + start,
              blocks_from(blocks, origin),
              update_constants<T>(b.settings),
          };
          launch_over_table(target, block_average_kernel<P>, arguments);
        });
  });
}

}  // namespace sassha::cuda
