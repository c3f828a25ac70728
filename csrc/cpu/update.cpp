// update_: exp_avg, exp_hessian (on a Hessian step) and the weights in one pass. Moves 24 bytes per float32 element on
// a lazy step, 32 on a Hessian step.

#include <optional>

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/finite.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"
#include "math/sassha.h"

namespace sassha::cpu {
namespace {

double scalar(const Tensor& tensor, const char* name) {
  check_scalar(tensor, name);
  double value = 0;
  with_dtype(tensor.scalar_type(), [&](auto zero) {
    value = static_cast<double>(*static_cast<const decltype(zero)*>(tensor.const_data_ptr()));
  });
  return value;
}

bool all_finite(const std::vector<Tensor>& guards) {
  return std::all_of(guards.begin(), guards.end(),
                     [](const Tensor& guard) { return std::isfinite(scalar(guard, "a guard")); });
}

// Advances the counts of every row, and works out its scalars; neighbours mostly share them.
template <class T>
std::vector<UpdateScalars<T>> advance(int64_t* steps, const RowSettings* per_row, const std::vector<int64_t>& rows,
                                      bool hessian_step, const Settings& settings) {
  std::vector<UpdateScalars<T>> scalars;
  scalars.reserve(rows.size());
  int64_t last = -1;
  for (const int64_t row : rows) {
    int64_t& step = steps[2 * row];
    int64_t& exponent = steps[2 * row + 1];
    ++step;
    if (hessian_step) exponent = next_hessian_step(settings, step, exponent);
    const bool same = last >= 0 && step == steps[2 * last] && exponent == steps[2 * last + 1] &&
                      std::memcmp(per_row + row, per_row + last, sizeof(RowSettings)) == 0;
    scalars.push_back(same ? scalars.back() : update_scalars<T>(settings, per_row[row], step, exponent));
    last = row;
  }
  return scalars;
}

template <class T, Power kPower, bool kHessianStep>
SASSHA_CLONES void update_tile(const T* __restrict w, const T* __restrict g, const T* __restrict product,
                               T* __restrict exp_avg, T* __restrict exp_hessian, T* __restrict result, int64_t n,
                               UpdateConstants<T> c, UpdateScalars<T> s) {
  for (int64_t i = 0; i < n; ++i) {
    exp_avg[i] = averaged_gradient(exp_avg[i], g[i], c);
    if (kHessianStep) exp_hessian[i] = averaged_hessian(exp_hessian[i], product[i], c);
    result[i] = updated<T, kPower>(w[i], exp_avg[i], exp_hessian[i], c, s);
  }
}

template <class T>
using UpdateTile = void (*)(const T*, const T*, const T*, T*, T*, T*, int64_t, UpdateConstants<T>, UpdateScalars<T>);

template <class T, bool kHessianStep>
UpdateTile<T> update_tile_for(Power power) {
  switch (power) {
    case Power::kSquareRoot:
      return update_tile<T, Power::kSquareRoot, kHessianStep>;
    case Power::kIdentity:
      return update_tile<T, Power::kIdentity, kHessianStep>;
    default:
      return update_tile<T, Power::kGeneral, kHessianStep>;
  }
}

// A range of one parameter. Products come in the parameter's dtype, means over several samples in the compute type.
template <class P>
struct UpdateRange {
  using T = Compute<P>;
  P* w;
  const P* g;
  const P* product;
  const T* mean_product;
  const P* old;  // w itself, where nothing was perturbed
  T* exp_avg;
  T* exp_hessian;

  void run(int64_t n, UpdateTile<T> update, const UpdateConstants<T>& constants, const UpdateScalars<T>& scalars,
           bool streaming) const {
    for_each_tile(n, [&](int64_t start, int64_t length) {
      T w_tile[kTile], g_tile[kTile], product_tile[kTile];
      const T* hessian = product        ? load(product + start, product_tile, length)
                         : mean_product ? mean_product + start
                                        : nullptr;
      const T* weight = old == w ? copied(old + start, w_tile, length) : load(old + start, w_tile, length);
      const T* gradient = load(g + start, g_tile, length);
      with_result(w + start, length, streaming, [&](T* result) {
        update(weight, gradient, hessian, exp_avg + start, exp_hessian + start, result, length, constants, scalars);
      });
    });
  }
};

void update_(StableListHandle param_list, StableListHandle grad_list, StableListHandle product_list,
             std::optional<Tensor> backup, Tensor exp_avg, Tensor exp_hessian, Tensor steps, Tensor skipped,
             std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor layouts, std::vector<Tensor> guards,
             bool guard_grads, Tensor per_row, std::vector<double> numbers) {
  const TensorList params(param_list, layouts);
  const TensorList grads(grad_list, params);
  const bool hessian_step = list_size(product_list) > 0;
  const TensorList products = hessian_step ? TensorList(product_list, params) : TensorList(product_list);
  const Settings settings = settings_of(numbers);
  check_update(params, grads, products, backup, exp_avg, exp_hessian, steps, skipped, offsets, rows, per_row);
  const bool finite = all_finite(guards) && (!guard_grads || (cpu::all_finite(grads) && cpu::all_finite(products)));
  *static_cast<int64_t*>(skipped.mutable_data_ptr()) = finite ? 0 : 1;
  if (params.empty() || (!finite && !backup)) return;
  const ElementRanges ranges(params);
  with_dtype(params.dtype(), [&](auto zero) {
    using P = decltype(zero);
    using T = Compute<P>;
    const P* backups = backup ? static_cast<const P*>(backup->const_data_ptr()) : nullptr;
    // Weights that were just read are in the caches, where a plain store costs no more.
    const bool streaming = backup && ranges.streaming<P>();
    if (!finite) {
      ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
        copy(params.data<P>(i) + begin, backups + offsets[i] + begin, end - begin, streaming);
      });
      return;
    }
    const UpdateConstants<T> constants = update_constants<T>(settings);
    const auto scalars =
        advance<T>(static_cast<int64_t*>(steps.mutable_data_ptr()),
                   static_cast<const RowSettings*>(per_row.const_data_ptr()), rows, hessian_step, settings);
    const Power power = power_of(settings.hessian_power);
    const auto update = hessian_step ? update_tile_for<T, true>(power) : update_tile_for<T, false>(power);
    const bool means = hessian_step && products.dtype() != params.dtype();
    T* averages = static_cast<T*>(exp_avg.mutable_data_ptr());
    T* hessians = static_cast<T*>(exp_hessian.mutable_data_ptr());
    ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
      const int64_t flat = offsets[i] + begin;
      P* const w = params.data<P>(i) + begin;
      const UpdateRange<P> range{
          w,
          grads.data<P>(i) + begin,
          hessian_step && !means ? products.data<const P>(i) + begin : nullptr,
          means ? products.data<const T>(i) + begin : nullptr,
          backups ? backups + flat : w,
          averages + flat,
          hessians + flat,
      };
      range.run(end - begin, update, constants, scalars[i], streaming);
    });
  });
  params.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("update_", TORCH_BOX(&sassha::cpu::update_)); }
