// One parallel region over all elements of a list of tensors, however many and however small they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/platform.h"
#include "tensor_list.h"

namespace sassha::cpu {

// Ranges start at multiples of this many elements of a tensor. The norm sums each block by itself, in a fixed order.
constexpr int64_t kBlock = 16384;

// Fewer elements than this are not worth waking a second thread.
constexpr int64_t kSerial = 16384;

// From this many bytes written on, results leave the caches before anyone reads them: stream them.
constexpr int64_t kStreamingBytes = 8 << 20;

// All elements of a list of tensors, one tensor after the other, and how to share them out among the threads.
class ElementRanges {
 public:
  explicit ElementRanges(const TensorList& tensors) : tensors_(tensors), first_(tensors.size() + 1) {
    for (int64_t i = 0; i < tensors.size(); ++i) first_[i + 1] = first_[i] + tensors.numel(i);
  }

  int64_t count() const { return first_.back(); }

  // Whether writing an array of P for these elements should go around the caches.
  template <class P>
  bool streaming() const {
    return count() * static_cast<int64_t>(sizeof(P)) > kStreamingBytes;
  }

  // Calls body(tensor, begin, end) for ranges that cover every element once. Each thread has one share of the whole, as
  // long a run of memory as can be.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t shares = count() < kSerial ? 1 : torch::stable::get_num_threads();
    torch::stable::parallel_for(0, shares, 1, [&](int64_t share, int64_t last_share) {
      const Position begin = boundary(share, shares), end = boundary(last_share, shares);
      for (int64_t i = begin.tensor; i < tensors_.size() && i <= end.tensor; ++i) {
        const int64_t from = i == begin.tensor ? begin.element : 0;
        const int64_t to = i == end.tensor ? end.element : tensors_.numel(i);
        if (from < to) body(i, from, to);
      }
      finish_streaming();
    });
  }

 private:
  struct Position {
    int64_t tensor;
    int64_t element;
  };

  Position boundary(int64_t share, int64_t shares) const {
    const int64_t target = count() / shares * share + count() % shares * share / shares;
    const int64_t tensor = std::upper_bound(first_.begin(), first_.end(), target) - first_.begin() - 1;
    if (tensor == tensors_.size()) return {tensor, 0};
    const int64_t block = (target - first_[tensor]) / kBlock;
    return {tensor, block * kBlock};
  }

  const TensorList& tensors_;
  std::vector<int64_t> first_;  // index of each tensor's first element in the whole
};

}  // namespace sassha::cpu
