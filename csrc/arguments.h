// What every backend checks of an operator's arguments before it computes anything.
#pragma once

#include <cstring>
#include <optional>

#include "math/sassha.h"
#include "tensor_list.h"

namespace sassha {

// The dtype of the state of parameters, and of the scalars their arithmetic uses.
inline ScalarType state_dtype(ScalarType params) {
  return params == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than its parameters call for");
}

inline void check_scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, " must have one element, has ", tensor.numel());
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_indices(const std::vector<int64_t>& indices, int64_t tensors) {
  STD_TORCH_CHECK(static_cast<int64_t>(indices.size()) == tensors, "expected one index per tensor");
  for (const int64_t index : indices) STD_TORCH_CHECK(index >= 0, "index ", index, " is negative");
}

inline void check_evaluation(const Tensor& evaluation) {
  check_dtype(evaluation, ScalarType::Long, "evaluation");
  check_scalar(evaluation, "evaluation");
}

// One of so many values, counted from 0.
inline void check_mode(double mode, int values, const char* name) {
  for (int value = 0; value < values; ++value) {
    if (mode == value) return;
  }
  STD_TORCH_CHECK(false, name, " must be an index below ", values, ", got ", mode);
}

inline Settings settings_of(const std::vector<double>& numbers) {
  constexpr size_t kFields = sizeof(Settings) / sizeof(double);
  STD_TORCH_CHECK(numbers.size() == kFields, "settings must be ", kFields, " numbers, got ", numbers.size());
  Settings settings;
  std::memcpy(&settings, numbers.data(), sizeof(settings));
  check_mode(settings.bias_correction, 3, "bias_correction");
  check_mode(settings.ascent, 2, "ascent");
  check_mode(settings.second_average, 4, "second_average");
  check_mode(settings.direction, 3, "direction");
  const double block = settings.hessian_block;
  STD_TORCH_CHECK(
      block == 1 || block == 2 || block == 4 || block == 8 || block == 16 || block == 32 || block == 64 || block == 128,
      "hessian_block must be a power of 2 from 1 to 128, got ", block);
  return settings;
}

inline void check_rows(const std::vector<int64_t>& rows, const TensorList& tensors, const Tensor& per_row) {
  constexpr int64_t kFields = sizeof(RowSettings) / sizeof(double);
  check_dtype(per_row, ScalarType::Double, "per_row");
  check_contiguous(per_row, "per_row");
  STD_TORCH_CHECK(per_row.dim() == 2 && per_row.size(1) == kFields, "per_row must have rows of ", kFields, " numbers");
  STD_TORCH_CHECK(static_cast<int64_t>(rows.size()) == tensors.size(), "expected one row per tensor");
  for (const int64_t row : rows) {
    STD_TORCH_CHECK(row >= 0 && row < per_row.size(0), "row ", row, " is not one of per_row");
  }
}

inline void check_grad_norm(const TensorList& params, const TensorList& grads, bool without_params) {
  STD_TORCH_CHECK(!grads.empty(), "grads is empty");
  STD_TORCH_CHECK(without_params || grads.dtype() == params.dtype(), "grads and params differ in dtype");
}

inline void check_perturb(const TensorList& params, const TensorList& grads, const std::optional<Tensor>& backup,
                          const std::vector<int64_t>& offsets, const std::vector<int64_t>& rows, const Tensor& norm,
                          const Tensor& per_row, const Settings& settings) {
  if (backup) params.check_parts(offsets, *backup);
  check_rows(rows, params, per_row);
  if (params.empty()) return;
  const bool momentum = is(settings.ascent, Ascent::kMomentum);
  STD_TORCH_CHECK(grads.dtype() == (momentum ? state_dtype(params.dtype()) : params.dtype()),
                  "grads and params differ in dtype");
  STD_TORCH_CHECK(settings.adaptive == 0 || grads.dtype() == params.dtype(),
                  "adaptive needs params of the dtype of exp_avg, along which they go");
  if (backup) {
    check_dtype(*backup, params.dtype(), "backup");
    check_contiguous(*backup, "backup");
  }
  check_dtype(norm, ScalarType::Double, "norm");
  check_scalar(norm, "norm");
}

inline void check_hutchinson(const TensorList& products, const Tensor& estimate, const std::vector<int64_t>& offsets,
                             const std::vector<int64_t>& indices, const Tensor& evaluation) {
  products.check_parts(offsets, estimate);
  check_indices(indices, products.size());
  check_evaluation(evaluation);
  if (products.empty()) return;
  check_contiguous(estimate, "estimate");
  check_dtype(estimate, state_dtype(products.dtype()), "estimate");
}

// How many numbers exp_hessian has for so many elements of the flat state.
inline void check_blocks(const Tensor& exp_hessian, int64_t elements, int64_t blocked, const Settings& settings) {
  STD_TORCH_CHECK(blocked >= 0 && blocked <= elements && blocked % 128 == 0, "blocked must be a multiple of 128 up to ",
                  elements, ", got ", blocked);
  STD_TORCH_CHECK(exp_hessian.numel() == blocks_of(settings, blocked).index(elements),
                  "exp_hessian has another length than exp_avg calls for");
  check_contiguous(exp_hessian, "exp_hessian");
}

inline void check_block_average(const TensorList& products, const Tensor& exp_hessian, const Tensor& averaged,
                                const std::vector<int64_t>& offsets, int64_t blocked, const Settings& settings) {
  STD_TORCH_CHECK(static_cast<int64_t>(offsets.size()) == products.size(), "expected one offset per tensor");
  STD_TORCH_CHECK(exp_hessian.numel() == averaged.numel(), "averaged and exp_hessian differ in length");
  STD_TORCH_CHECK(blocked >= 0 && blocked % 128 == 0, "blocked must be a multiple of 128, got ", blocked);
  const Blocks blocks = blocks_of(settings, blocked);
  for (int64_t i = 0; i < products.size(); ++i) {
    STD_TORCH_CHECK(offsets[i] >= 0 && offsets[i] % 128 == 0, "offsets must be multiples of 128, got ", offsets[i]);
    if (products.numel(i) == 0) continue;
    STD_TORCH_CHECK(blocks.index(offsets[i] + products.numel(i) - 1) < exp_hessian.numel(), "tensor ", i,
                    " does not fit its part of the state");
  }
  if (products.empty()) return;
  for (const Tensor* state : {&exp_hessian, &averaged}) {
    check_contiguous(*state, "exp_hessian");
    STD_TORCH_CHECK(products.dtype() == state->scalar_type() || state_dtype(products.dtype()) == state->scalar_type(),
                    "exp_hessian has another dtype than its parameters call for");
  }
}

inline void check_update(const TensorList& params, const TensorList& grads, const TensorList& products,
                         const std::optional<Tensor>& averaged, const std::optional<Tensor>& backup,
                         const std::optional<Tensor>& norm, const Tensor& exp_avg,
                         const std::optional<Tensor>& exp_hessian, const std::optional<Tensor>& exp_avg_norm,
                         const Tensor& steps, const Tensor& skipped, const std::vector<int64_t>& offsets,
                         const std::vector<int64_t>& rows, int64_t blocked, const Tensor& per_row,
                         const Settings& settings) {
  params.check_parts(offsets, exp_avg);
  check_rows(rows, params, per_row);
  STD_TORCH_CHECK(!backup || backup->numel() == exp_avg.numel(), "backup and exp_avg differ in length");
  check_contiguous(exp_avg, "exp_avg");
  const bool plain = is(settings.direction, Direction::kPlain);
  STD_TORCH_CHECK(plain || exp_hessian, "exp_hessian is missing");
  STD_TORCH_CHECK(!plain || products.empty(), "a plain direction takes no products");
  if (exp_hessian) check_blocks(*exp_hessian, exp_avg.numel(), blocked, settings);
  STD_TORCH_CHECK(products.empty() || settings.hessian_block == 1, "products come by blocks, as averaged");
  STD_TORCH_CHECK(settings.hessian_block == 1 || !is(settings.second_average, SecondAverage::kGradient),
                  "squares of gradients have no blocks");
  if (averaged) {
    const bool of_hessian = !plain && !is(settings.second_average, SecondAverage::kGradient);
    STD_TORCH_CHECK(of_hessian, "averaged is of the Hessian, which these settings have no average of");
    STD_TORCH_CHECK(products.empty() && exp_hessian && averaged->numel() == exp_hessian->numel(),
                    "averaged does not go with products and exp_hessian");
    check_dtype(*averaged, exp_avg.scalar_type(), "averaged");
    check_contiguous(*averaged, "averaged");
  }
  if (norm) {
    STD_TORCH_CHECK(!backup && settings.adaptive == 0, "norm goes neither with backup nor with adaptive");
    check_dtype(*norm, ScalarType::Double, "norm");
    check_scalar(*norm, "norm");
  }
  if (exp_avg_norm) {
    STD_TORCH_CHECK(products.empty(), "exp_avg_norm does not go with products");
    STD_TORCH_CHECK(!is(settings.direction, Direction::kClipped), "exp_avg_norm does not go with a clipped direction");
    STD_TORCH_CHECK(plain || settings.hessian_power == 0.5 || !is(settings.second_average, SecondAverage::kGradient),
                    "exp_avg_norm goes with squares of gradients at the power 0.5 alone");
    check_dtype(*exp_avg_norm, ScalarType::Double, "exp_avg_norm");
    check_scalar(*exp_avg_norm, "exp_avg_norm");
  }
  check_dtype(steps, ScalarType::Long, "steps");
  check_contiguous(steps, "steps");
  STD_TORCH_CHECK(steps.dim() == 2 && steps.size(1) == 2, "steps must have the rows (step, hessian_step)");
  STD_TORCH_CHECK(steps.size(0) == per_row.size(0), "steps and per_row differ in rows");
  check_dtype(skipped, ScalarType::Long, "skipped");
  check_scalar(skipped, "skipped");
  if (params.empty()) return;
  const ScalarType state = state_dtype(params.dtype());
  STD_TORCH_CHECK(grads.dtype() == params.dtype(), "grads and params differ in dtype");
  STD_TORCH_CHECK(products.empty() || products.dtype() == params.dtype() || products.dtype() == state,
                  "products and params differ in dtype");
  STD_TORCH_CHECK(!norm || params.dtype() == state, "norm needs params of the dtype of exp_avg");
  if (backup) {
    check_dtype(*backup, params.dtype(), "backup");
    check_contiguous(*backup, "backup");
  }
  check_dtype(exp_avg, state, "exp_avg");
  if (exp_hessian) check_dtype(*exp_hessian, state, "exp_hessian");
}

}  // namespace sassha
