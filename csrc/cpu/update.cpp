// update_: exp_avg, exp_hessian (on a Hessian step) and the weights in one pass. Moves 24 bytes per float32 element on
// a lazy step, 32 on a Hessian step; with exp_hessian by blocks 20 and little more.

#include <optional>

#include "arguments.h"
#include "cpu/dtypes.h"
#include "cpu/finite.h"
#include "cpu/norm.h"
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
                                      bool second, double inverse, const Settings& settings) {
  std::vector<UpdateScalars<T>> scalars;
  scalars.reserve(rows.size());
  int64_t last = -1;
  for (const int64_t row : rows) {
    int64_t& step = steps[2 * row];
    int64_t& exponent = steps[2 * row + 1];
    ++step;
    if (second) exponent = next_hessian_step(settings, step, exponent);
    const bool same = last >= 0 && step == steps[2 * last] && exponent == steps[2 * last + 1] &&
                      std::memcmp(per_row + row, per_row + last, sizeof(RowSettings)) == 0;
    scalars.push_back(same ? scalars.back() : update_scalars<T>(settings, per_row[row], inverse, step, exponent));
    last = row;
  }
  return scalars;
}

template <class T, Kind kKind, bool kSecond>
SASSHA_CLONES void update_tile(const T* __restrict w, const T* __restrict g, const T* __restrict hessian,
                               T* __restrict exp_avg, T* __restrict exp_hessian, T* __restrict result, int64_t n,
                               UpdateConstants<T> c, UpdateScalars<T> s) {
  for (int64_t i = 0; i < n; ++i) {
    T D = kKind == Kind::kPlain ? T(0) : exp_hessian[i];
    result[i] = updated<T, kKind, kSecond>(w[i], g[i], kSecond ? hessian[i] : T(0), exp_avg[i], D, c, s);
    if (kSecond) exp_hessian[i] = D;
  }
}

template <class T>
using UpdateTile = void (*)(const T*, const T*, const T*, T*, T*, T*, int64_t, UpdateConstants<T>, UpdateScalars<T>);

template <class T, bool kSecond>
UpdateTile<T> update_tile_for(Kind kind) {
  switch (kind) {
    case Kind::kSquareRoot:
      return update_tile<T, Kind::kSquareRoot, kSecond>;
    case Kind::kIdentity:
      return update_tile<T, Kind::kIdentity, kSecond>;
    case Kind::kGeneral:
      return update_tile<T, Kind::kGeneral, kSecond>;
    case Kind::kClipped:
      return update_tile<T, Kind::kClipped, kSecond>;
    default:
      return update_tile<T, Kind::kPlain, false>;
  }
}

template <class T>
SASSHA_CLONES void unperturb_tile(T* __restrict w, const T* __restrict m, int64_t n, T scale) {
  for (int64_t i = 0; i < n; ++i) w[i] = unperturbed(w[i], m[i], scale);
}

template <class P>
void unperturb(P* w, const Compute<P>* m, int64_t n, Compute<P> scale) {
  if constexpr (std::is_same_v<P, Compute<P>>) unperturb_tile(w, m, n, scale);
}

// What all ranges of a step share.
template <class T>
struct UpdateStep {
  UpdateTile<T> update;
  UpdateConstants<T> constants;
  Blocks blocks;
  bool gradients_squared;  // into exp_hessian
  bool unperturbs;         // w is worked out from w'
  bool streaming;
};

// A range of one parameter. Products come in the parameter's dtype, means over several samples in the compute type.
template <class P>
struct UpdateRange {
  using T = Compute<P>;
  P* w;
  const P* g;
  const P* product;
  const T* mean_product;
  const P* old;  // w itself, where there is no backup
  T* exp_avg;
  T* exp_hessian;     // of the whole flat state
  const T* averaged;  // what takes its place, or null
  int64_t flat;

  void run(int64_t n, const UpdateStep<T>& step, const UpdateScalars<T>& scalars) const {
    for_each_tile(n, [&](int64_t start, int64_t length) {
      T w_tile[kTile], g_tile[kTile], product_tile[kTile], D_tile[kTile];
      T* const m = exp_avg + start;
      if (step.unperturbs) unperturb(w + start, m, length, scalars.perturbation);
      const T* gradient = load(g + start, g_tile, length);
      const T* hessian = product                  ? load(product + start, product_tile, length)
                         : mean_product           ? mean_product + start
                         : step.gradients_squared ? gradient
                                                  : nullptr;
      const T* weight = old == w ? copied(old + start, w_tile, length) : load(old + start, w_tile, length);
      T* const D = state_of(step.blocks, flat + start, length, D_tile);
      with_result(w + start, length, step.streaming, [&](T* result) {
        step.update(weight, gradient, hessian, m, D, result, length, step.constants, scalars);
      });
    });
  }

  // Where exp_hessian of these elements lies: one for each of them.
  T* state_of(const Blocks& blocks, int64_t element, int64_t length, T* tile) const {
    if (exp_hessian == nullptr) return nullptr;
    T* const own = exp_hessian + blocks.index(element);
    if (averaged) {
      const T* const from = averaged + blocks.index(element);
      std::copy_n(from, blocks.index(element + length - 1) - blocks.index(element) + 1, own);
    }
    if (element >= blocks.end || blocks.shift == 0) return own;
    for (int64_t i = 0; i < length; ++i) tile[i] = own[i >> blocks.shift];
    return tile;
  }
};

void update_(StableListHandle param_list, StableListHandle grad_list, StableListHandle product_list,
             std::optional<Tensor> averaged, std::optional<Tensor> backup, std::optional<Tensor> norm, Tensor exp_avg,
             std::optional<Tensor> exp_hessian, std::optional<Tensor> exp_avg_norm, Tensor steps, Tensor skipped,
             std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor layouts, int64_t blocked,
             std::vector<Tensor> guards, bool guard_grads, Tensor per_row, std::vector<double> numbers) {
  const TensorList params(param_list, layouts);
  const TensorList grads(grad_list, params);
  const bool has_products = list_size(product_list) > 0;
  const TensorList products = has_products ? TensorList(product_list, params) : TensorList(product_list);
  const Settings settings = settings_of(numbers);
  check_update(params, grads, products, averaged, backup, norm, exp_avg, exp_hessian, exp_avg_norm, steps, skipped,
               offsets, rows, blocked, per_row, settings);
  const bool finite = all_finite(guards) && (!guard_grads || (cpu::all_finite(grads) && cpu::all_finite(products)));
  *static_cast<int64_t*>(skipped.mutable_data_ptr()) = finite ? 0 : 1;
  const double size = norm ? scalar(*norm, "norm") : 0;
  const bool unperturbs = norm && std::isfinite(size);
  if (params.empty() || (!finite && !backup && !unperturbs)) return;
  const ElementRanges ranges(params);
  std::optional<BlockSums> sums;  // of exp_avg, each taken while the block is in the caches
  if (exp_avg_norm) sums.emplace(params);
  with_dtype(params.dtype(), [&](auto zero) {
    using P = decltype(zero);
    using T = Compute<P>;
    const P* backups = backup ? static_cast<const P*>(backup->const_data_ptr()) : nullptr;
    // Weights that were just read are in the caches, where a plain store costs no more.
    const bool streaming = backup && ranges.streaming<P>();
    T* averages = static_cast<T*>(exp_avg.mutable_data_ptr());
    const auto* of_rows = static_cast<const RowSettings*>(per_row.const_data_ptr());
    const double inverse = unperturbs ? inverse_norm(size) : 0;
    if (!finite) {
      ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
        P* const w = params.data<P>(i) + begin;
        const int64_t flat = offsets[i] + begin;
        if (backups) return copy(w, backups + flat, end - begin, streaming);
        unperturb(w, averages + flat, end - begin, perturbation_scale<T>(of_rows[rows[i]].rho, inverse, settings));
      });
      return;
    }
    const bool second = averages_second(settings, has_products || averaged);
    const auto scalars =
        advance<T>(static_cast<int64_t*>(steps.mutable_data_ptr()), of_rows, rows, second, inverse, settings);
    // What averaged holds is read as on a lazy step.
    const bool written = second && !averaged;
    const Kind kind = kind_of(settings);
    const UpdateStep<T> step{
        written ? update_tile_for<T, true>(kind) : update_tile_for<T, false>(kind),
        update_constants<T>(settings),
        blocks_of(settings, blocked),
        written && !has_products,
        unperturbs,
        streaming,
    };
    const bool means = has_products && products.dtype() != params.dtype();
    T* hessians = exp_hessian ? static_cast<T*>(exp_hessian->mutable_data_ptr()) : nullptr;
    const auto update_range = [&](int64_t i, int64_t begin, int64_t length) {
      const int64_t flat = offsets[i] + begin;
      P* const w = params.data<P>(i) + begin;
      const UpdateRange<P> range{
          w,
          grads.data<P>(i) + begin,
          has_products && !means ? products.data<const P>(i) + begin : nullptr,
          means ? products.data<const T>(i) + begin : nullptr,
          backups ? backups + flat : w,
          averages + flat,
          hessians,
          averaged ? static_cast<const T*>(averaged->const_data_ptr()) : nullptr,
          flat,
      };
      range.run(length, step, scalars[i]);
    };
    ranges.for_each([&](int64_t i, int64_t begin, int64_t end) {
      if (!sums) return update_range(i, begin, end - begin);
      for_each_block(begin, end, [&](int64_t start, int64_t length) {
        update_range(i, start, length);
        const T* const m = averages + offsets[i] + start;
        sums->of(i, start) = sum_of_squares<T, false>(m, m, length);
      });
    });
    if (sums) *static_cast<double*>(exp_avg_norm->mutable_data_ptr()) = sums->norm();
  });
  params.write_back();
}

}  // namespace
}  // namespace sassha::cpu

STABLE_TORCH_LIBRARY_IMPL(sassha_fused, CPU, m) { m.impl("update_", TORCH_BOX(&sassha::cpu::update_)); }
