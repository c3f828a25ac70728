// Rademacher signs for a run of elements.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/platform.h"
#include "math/philox.h"

namespace sassha::cpu {

template <class T>
SASSHA_CLONES void expand_signs(const SignBlock& block, T* signs) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = block.word[i];
    for (int bit = 0; bit < 32; ++bit) signs[32 * i + bit] = sign_of<T>(word, bit);
  }
}

inline void check_indices(const std::vector<int64_t>& indices, int64_t tensors) {
  STD_TORCH_CHECK(static_cast<int64_t>(indices.size()) == tensors, "expected one index per tensor");
  for (const int64_t index : indices) STD_TORCH_CHECK(index >= 0, "index ", index, " is negative");
}

// Reads on through a stream of signs, and draws each block once, however short the runs.
template <class T>
class SignReader {
 public:
  explicit SignReader(const SignStream& stream) : stream_(stream) {}

  // signs[0 .. n) <- the signs of the elements index .. index + n.
  void read(int64_t index, T* signs, int64_t n) {
    while (n > 0) {
      if (index / kSignsPerBlock != block_) {
        block_ = index / kSignsPerBlock;
        expand_signs(sign_block(stream_, block_), drawn_);
      }
      const int64_t first = index % kSignsPerBlock;
      const int64_t count = std::min(n, kSignsPerBlock - first);
      std::copy_n(drawn_ + first, count, signs);
      index += count;
      signs += count;
      n -= count;
    }
  }

 private:
  const SignStream stream_;
  int64_t block_ = -1;
  T drawn_[kSignsPerBlock];
};

}  // namespace sassha::cpu
