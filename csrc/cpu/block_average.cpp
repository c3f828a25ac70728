// block_average_: averaged <- exp_hessian with the means of |products| over blocks averaged in. Reads 4 bytes per
// float32 element, and moves 8 per block.

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"
#include "math/sassha.h"

namespace sassha::cpu {
namespace {

// means[i] <- the mean of the i-th block of a tile of magnitudes, which is used up.
template <class T>
SASSHA_CLONES void average_tile(T* x, int64_t n, int shift, T* means) {
  const int64_t block = int64_t{1} << shift, count = (n + block - 1) >> shift;
  std::fill(x + n, x + (count << shift), T(0));
  for (int level = 0; level < shift; ++level) {
    for (int64_t i = 0; i < count << (shift - level - 1); ++i) x[i] = x[2 * i] + x[2 * i + 1];
  }
  for (int64_t i = 0; i < count; ++i) means[i] = x[i] / static_cast<T>(std::min(block, n - i * block));
}

template <class T>
SASSHA_CLONES void average_means(const T* exp_hessian, const T* means, T* averaged, int64_t n, UpdateConstants<T> c) {
  for (int64_t i = 0; i < n; ++i) averaged[i] = averaged_hessian(exp_hessian[i], means[i], c);
}

void block_average_(StableListHandle product_list, Tensor exp_hessian, Tensor averaged, std::vector<int64_t> offsets,
                    int64_t blocked, std::vector<double> numbers) {
  const TensorList products(product_list);
  const Settings settings = settings_of(numbers);
  check_block_average(products, exp_hessian, averaged, offsets, blocked, settings);
  if (products.empty()) return;
  const Blocks blocks = blocks_of(settings, blocked);
  with_dtype(products.dtype(), [&](auto zero) {
    using P = decltype(zero);
    using T = Compute<P>;
    const UpdateConstants<T> constants = update_constants<T>(settings);
    const T* old = static_cast<const T*>(exp_hessian.const_data_ptr());
    T* result = static_cast<T*>(averaged.mutable_data_ptr());
    ElementRanges(products).for_each([&](int64_t i, int64_t begin, int64_t end) {
      const P* product = products.data<P>(i);
      for_each_tile(end - begin, [&](int64_t start, int64_t length) {
        const int64_t element = offsets[i] + begin + start, at = blocks.index(element);
        const int shift = element < blocks.end ? blocks.shift : 0;
        T scratch[kTile], magnitudes[kTile], means[kTile];
        const T* values = load(product + begin + start, scratch, length);
        for (int64_t j = 0; j < length; ++j) magnitudes[j] = std::fabs(values[j]);
        average_tile(magnitudes, length, shift, means);
        average_means(old + at, means, result + at, ((length - 1) >> shift) + 1, constants);
      });
    });
  });
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("block_average_", TORCH_BOX(&sassha::cpu::block_average_)); }
