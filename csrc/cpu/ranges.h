// One parallel region over all elements of a list of tensors, however many and however small they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/platform.h"
#include "tensor_list.h"

namespace sassha::cpu {

// The unit of work: small enough to balance the threads, and the fixed unit of the norm's summation.
constexpr int64_t kBlock = 4096;

// Fewer elements than this are not worth waking a second thread.
constexpr int64_t kSerial = 16384;

// From this many bytes written on, results leave the caches before anyone reads them: stream them.
constexpr int64_t kStreamingBytes = 8 << 20;

// The chunk table: tensor i owns the blocks first_block[i] to first_block[i + 1] - 1.
struct Blocks {
  std::vector<int64_t> numel;
  std::vector<int64_t> first_block;
  int64_t elements = 0;

  explicit Blocks(const TensorList& tensors) : first_block{0} {
    numel.reserve(tensors.size());
    first_block.reserve(tensors.size() + 1);
    for (int64_t i = 0; i < tensors.size(); ++i) {
      numel.push_back(tensors.numel(i));
      elements += numel.back();
      first_block.push_back(first_block.back() + (numel.back() + kBlock - 1) / kBlock);
    }
  }

  int64_t count() const { return first_block.back(); }

  // Calls body(tensor, begin, end) for ranges that cover every element once. A thread's blocks are consecutive, so its
  // ranges are as long as can be; all but a tensor's last one end on a block boundary.
  template <class Body>
  void for_each_range(const Body& body) const {
    const int64_t grain = elements < kSerial ? std::max<int64_t>(count(), 1) : 1;
    torch::stable::parallel_for(0, count(), grain, [&](int64_t block, int64_t last) {
      int64_t tensor = std::upper_bound(first_block.begin(), first_block.end(), block) - first_block.begin() - 1;
      while (block < last) {
        const int64_t stop = std::min(last, first_block[tensor + 1]);
        const int64_t begin = (block - first_block[tensor]) * kBlock;
        const int64_t end = std::min(numel[tensor], (stop - first_block[tensor]) * kBlock);
        if (begin < end) body(tensor, begin, end);
        block = stop;
        ++tensor;
      }
      finish_streaming();
    });
  }
};

}  // namespace sassha::cpu
