// Random signs for the vectors of a chunk: each thread of a warp draws words that others need too, and they trade.
#pragma once

#include "cuda/vectors.h"
#include "math/philox.h"

namespace sassha::cuda {

// A table whose tensors have an index each: that of its first element among all elements of the optimizer.
struct SignTable : Table<1, sizeof(int64_t)> {
  int64_t index[kCapacity];
};

struct SignArguments {
  uint64_t seed;
  const int64_t* evaluation;
  uint32_t sample;

  __device__ SignStream stream() const { return {seed, static_cast<uint32_t>(*evaluation), sample}; }
};

// The 128 signs of a unit stand in at most eight words, of two neighbouring Philox blocks. A warp's four units are 32
// words: one for each thread.
class WarpSigns {
 public:
  __device__ WarpSigns(const SignTable& table, const SignStream& stream, uint32_t chunk_first_unit)
      : first_unit_(chunk_first_unit) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t unit = first_unit_ + lane / 8;
    if (unit >= table.first_unit[table.count]) return;
    const int entry = table.entry_of(unit, 0);
    const int64_t index = table.index[entry] + int64_t{unit - table.first_unit[entry]} * kUnit;
    const SignBlock block = sign_block(stream, index / kSignsPerBlock + lane % 8 / 4);
    const uint32_t low = lane % 2 ? block.word[1] : block.word[0];
    const uint32_t high = lane % 2 ? block.word[3] : block.word[2];
    word_ = lane % 4 < 2 ? low : high;
  }

  // signs[i] <- the sign of the i-th element of a vector at a place. All threads of the warp call this together.
  template <class T, int kCount>
  __device__ void read(const SignTable& table, const Place& at, T (&signs)[kCount]) const {
    const int unit = at.length == 0 ? 0 : static_cast<int>(at.flat / kUnit - first_unit_);
    const int position = static_cast<int>(table.index[at.entry] % kSignsPerBlock + at.element % kUnit);
    const int source = unit * 8 + position / 32;
    const uint32_t word = __shfl_sync(0xffffffffu, word_, source);
    const uint32_t next = __shfl_sync(0xffffffffu, word_, (source + 1) % kWarp);
    const uint32_t bits = __funnelshift_r(word, next, position % 32);
#pragma unroll
    for (int i = 0; i < kCount; ++i) signs[i] = sign_of<T>(bits, i);
  }

 private:
  const uint32_t first_unit_;
  uint32_t word_ = 0;
};

}  // namespace sassha::cuda
