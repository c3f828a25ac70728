// How the elements of a table are shared out among the threads, and how they come and go: 16 bytes at a time.
#pragma once

#include <cstring>

#include "cuda/platform.h"
#include "cuda/table.h"

namespace sassha::cuda {

constexpr int kVectorBytes = 16;

template <class P>
constexpr int kVector = kVectorBytes / sizeof(P);

// A warp takes this many elements, four units, at a time.
constexpr int kChunkUnits = 4;
constexpr int kChunk = kChunkUnits * kUnit;

// How many vectors that is for each of its threads.
template <class P>
constexpr int kVectorsPerChunk = kChunk / (kWarp * kVector<P>);

// A vector of a table: some elements of one tensor, in a row.
struct Place {
  int entry;
  int length;       // how many of the vector's elements there are: 0 behind a tensor's end, and in gaps
  int64_t element;  // of the tensor, the first one
  int64_t flat;     // the first one, counted from the table's first unit

  template <class P>
  __device__ bool whole() const {
    return length == kVector<P>;
  }
};

// The vectors that this thread works on, one chunk of its warp after the other. All threads of a warp stay together.
template <class P, class AnyTable, int kCount = kVector<P>>
class Chunks {
 public:
  __device__ explicit Chunks(const AnyTable& table)
      : table_(table),
        first_unit_((blockIdx.x * kThreads + threadIdx.x) / kWarp * kChunkUnits),
        units_(table.first_unit[table.count]) {}

  __device__ bool more() const { return first_unit_ < units_; }

  __device__ void next() { first_unit_ += gridDim.x * (kThreads / kWarp * kChunkUnits); }

  __device__ uint32_t first_unit() const { return first_unit_; }

  // The vector of this thread that is the j-th of the chunk.
  __device__ Place place(int j) {
    const int lane = threadIdx.x % kWarp;
    const int within = (j * kWarp + lane) * kCount;
    const uint32_t unit = first_unit_ + within / kUnit;
    if (unit >= units_) return {0, 0, 0, 0};
    entry_ = table_.entry_of(unit, entry_);
    const int64_t flat = int64_t{first_unit_} * kUnit + within;
    const int64_t element = flat - int64_t{table_.first_unit[entry_]} * kUnit;
    const int64_t left = table_.numel(entry_) - element;
    if (table_.data[0][entry_] == nullptr || left <= 0) return {0, 0, 0, 0};
    return {entry_, left < kCount ? static_cast<int>(left) : kCount, element, flat};
  }

 private:
  const AnyTable& table_;
  uint32_t first_unit_;  // of the chunk
  const uint32_t units_;
  int entry_ = 0;
};

// Whether all of these can be read and written 16 bytes at a time.
template <class... Pointers>
__device__ __forceinline__ bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & (kVectorBytes - 1)) == 0;
}

// Whether memory is read or written for the last time in a while: such lines should not push others out of the cache.
enum class Reuse { kSoon, kLate };

template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void load(const E* from, int length, bool vectors, E (&to)[kCount]) {
  if (vectors) {
    constexpr int kEach = kVectorBytes / sizeof(E);
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      const uint4* address = reinterpret_cast<const uint4*>(from + i);
      const uint4 raw = kReuse == Reuse::kLate ? __ldcs(address) : *address;
      memcpy(to + i, &raw, sizeof(raw));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < length ? from[i] : E();
  }
}

template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void store(const E (&from)[kCount], int length, bool vectors, E* to) {
  if (vectors) {
    constexpr int kEach = kVectorBytes / sizeof(E);
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      uint4 raw;
      memcpy(&raw, from + i, sizeof(raw));
      uint4* address = reinterpret_cast<uint4*>(to + i);
      if (kReuse == Reuse::kLate) {
        __stcs(address, raw);
      } else {
        *address = raw;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < length) to[i] = from[i];
    }
  }
}

}  // namespace sassha::cuda
