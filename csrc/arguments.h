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

inline Settings settings_of(const std::vector<double>& numbers) {
  constexpr size_t kFields = sizeof(Settings) / sizeof(double);
  STD_TORCH_CHECK(numbers.size() == kFields, "settings must be ", kFields, " numbers, got ", numbers.size());
  Settings settings;
  std::memcpy(&settings, numbers.data(), sizeof(settings));
  const double correction = settings.bias_correction;
  STD_TORCH_CHECK(correction == 0 || correction == 1 || correction == 2, "bias_correction must be 0, 1 or 2, got ",
                  correction);
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

inline void check_perturb(const TensorList& params, const TensorList& grads, const Tensor& backup,
                          const std::vector<int64_t>& offsets, const std::vector<int64_t>& rows, const Tensor& norm,
                          const Tensor& per_row) {
  params.check_parts(offsets, backup);
  check_rows(rows, params, per_row);
  if (params.empty()) return;
  STD_TORCH_CHECK(grads.dtype() == params.dtype(), "grads and params differ in dtype");
  check_dtype(backup, params.dtype(), "backup");
  check_contiguous(backup, "backup");
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

inline void check_update(const TensorList& params, const TensorList& grads, const TensorList& products,
                         const std::optional<Tensor>& backup, const Tensor& exp_avg, const Tensor& exp_hessian,
                         const Tensor& steps, const Tensor& skipped, const std::vector<int64_t>& offsets,
                         const std::vector<int64_t>& rows, const Tensor& per_row) {
  params.check_parts(offsets, exp_avg);
  check_rows(rows, params, per_row);
  STD_TORCH_CHECK(exp_hessian.numel() == exp_avg.numel() && (!backup || backup->numel() == exp_avg.numel()),
                  "backup, exp_avg and exp_hessian differ in length");
  check_contiguous(exp_avg, "exp_avg");
  check_contiguous(exp_hessian, "exp_hessian");
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
  if (backup) {
    check_dtype(*backup, params.dtype(), "backup");
    check_contiguous(*backup, "backup");
  }
  check_dtype(exp_avg, state, "exp_avg");
  check_dtype(exp_hessian, state, "exp_hessian");
}

}  // namespace sassha
