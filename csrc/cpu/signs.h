// Rademacher signs for a run of elements.
#pragma once

#include "cpu/platform.h"
#include "math/philox.h"

namespace sassha::cpu {

template <class T>
SASSHA_CLONES void expand_signs(const SignBlock& block, T* signs, int first, int count) {
  for (int i = 0; i < count; ++i) signs[i] = sign_at<T>(block, first + i);
}

// signs[0 .. n) <- the signs of the elements index .. index + n.
template <class T>
void fill_signs(const SignStream& stream, int64_t index, T* signs, int64_t n) {
  for (int64_t done = 0; done < n;) {
    const int first = static_cast<int>((index + done) % kSignsPerBlock);
    const int count = static_cast<int>(n - done < kSignsPerBlock - first ? n - done : kSignsPerBlock - first);
    expand_signs(sign_block(stream, (index + done) / kSignsPerBlock), signs + done, first, count);
    done += count;
  }
}

}  // namespace sassha::cpu
