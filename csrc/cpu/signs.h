// Rademacher signs for a run of elements.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "cpu/platform.h"
#include "math/philox.h"

namespace sassha::cpu {

inline SignStream sign_stream(int64_t seed, const torch::stable::Tensor& evaluation, int64_t sample) {
  const int64_t index = *static_cast<const int64_t*>(evaluation.const_data_ptr());
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(index), static_cast<uint32_t>(sample)};
}

template <class T>
SASSHA_CLONES void expand_signs(const SignBlock& block, T* signs) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = block.word[i];
    for (int bit = 0; bit < 32; ++bit) signs[32 * i + bit] = sign_of<T>(word, bit);
  }
}

// Reads signs one run after another, and draws each block once, however short the runs.
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
