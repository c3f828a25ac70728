// The operators as torch calls them: arguments taken apart and checked, then handed to the launchers.
//
// Scratch memory is torch's own: its allocator keeps it for the stream's order and, while a CUDA graph is captured,
// takes it from the graph's pool.

#include <optional>
#include <utility>

#include "arguments.h"
#include "cuda/launchers.h"
#include "cuda/scope.h"
#include "library.h"

#ifndef SASSHA_DISPATCH_KEY
#define SASSHA_DISPATCH_KEY CUDA
#endif

namespace sassha::cuda {
namespace {

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "parameters must be float64, float32, bfloat16 or float16");
  }
}

Tensors memory_of(const TensorList& list) {
  Tensors tensors{dtype_of(list.dtype()), {}};
  tensors.data.reserve(list.size());
  for (int64_t i = 0; i < list.size(); ++i) tensors.data.push_back(list.data<void>(i));
  return tensors;
}

std::vector<int64_t> lengths_of(const TensorList& list) {
  std::vector<int64_t> numel;
  numel.reserve(list.size());
  for (int64_t i = 0; i < list.size(); ++i) numel.push_back(list.numel(i));
  return numel;
}

Scalar scalar_of(const Tensor& tensor, const char* name) {
  check_scalar(tensor, name);
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type())};
}

void check_device(const Tensor& tensor, const Tensor& param, const char* name) {
  STD_TORCH_CHECK(tensor.device() == param.device(), name, " is on another device than the first parameter");
}

Tensor scratch(const Tensor& like, int64_t bytes) { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); }

const RowSettings* row_settings(const Tensor& per_row) {
  return static_cast<const RowSettings*>(per_row.const_data_ptr());
}

PartialSums partial_sums(const Tensor& memory) { return {static_cast<double*>(memory.mutable_data_ptr()), 0}; }

int64_t sums_bytes(const Target& target, const std::vector<int64_t>& numel) {
  return most_partial_sums(target, numel) * static_cast<int64_t>(sizeof(double));
}

Tensor grad_norm(StableListHandle grad_list, StableListHandle param_list, std::optional<Tensor> layouts,
                 bool adaptive) {
  const TensorList params(param_list, layouts);
  const bool alone = params.empty() && !adaptive;
  const TensorList grads = alone ? TensorList(grad_list) : TensorList(grad_list, params);
  check_grad_norm(params, grads, alone);
  const Tensor first = grads.tensor(0);
  grads.check_device(first);
  params.check_device(first);
  const Scope scope(first);
  const Target target{"grad_norm", scope.stream()};
  const auto numel = lengths_of(grads);
  const Tensor memory = scratch(first, sums_bytes(target, numel));
  PartialSums partial = partial_sums(memory);
  const Tensors gradients = memory_of(grads);
  const std::optional<Tensors> weights = adaptive ? std::optional(memory_of(params)) : std::nullopt;
  sum_squares(target, numel, gradients, weights ? &*weights : nullptr, partial);
  Tensor norm = torch::stable::new_empty(first, {}, ScalarType::Double);
  finish_norm(target, partial, static_cast<double*>(norm.mutable_data_ptr()));
  return norm;
}

void perturb_(StableListHandle param_list, StableListHandle grad_list, std::optional<Tensor> backup,
              std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor layouts, Tensor norm, bool measure,
              Tensor per_row, std::vector<double> numbers) {
  const TensorList params(param_list, layouts);
  const TensorList grads(grad_list, params);
  const Settings settings = settings_of(numbers);
  check_perturb(params, grads, backup, offsets, rows, norm, per_row, settings);
  if (params.empty()) return;
  const Tensor first = params.tensor(0);
  params.check_device(first);
  grads.check_device(first);
  if (backup) check_device(*backup, first, "backup");
  check_device(norm, first, "norm");
  check_device(per_row, first, "per_row");
  const Scope scope(first);
  const Target target{"perturb_", scope.stream()};
  Perturbation p{};
  p.numel = lengths_of(params);
  p.offsets = std::move(offsets);
  p.rows = std::move(rows);
  p.params = memory_of(params);
  p.grads = memory_of(grads);
  p.backup = backup ? backup->mutable_data_ptr() : nullptr;
  p.norm = static_cast<double*>(norm.mutable_data_ptr());
  p.per_row = row_settings(per_row);
  p.settings = settings;
  const Tensor memory = scratch(first, measure ? sums_bytes(target, p.numel) : 0);
  p.partial = partial_sums(memory);
  if (measure) sum_squares(target, p.numel, p.grads, settings.adaptive != 0 ? &p.params : nullptr, p.partial);
  perturb(target, p);
  params.write_back();
}

Signs signs_of(std::vector<int64_t> indices, int64_t seed, const Tensor& evaluation, int64_t sample) {
  return {
      std::move(indices),
      static_cast<uint64_t>(seed),
      static_cast<const int64_t*>(evaluation.const_data_ptr()),
      static_cast<uint32_t>(sample),
  };
}

void rademacher_(StableListHandle sign_list, std::vector<int64_t> indices, int64_t seed, Tensor evaluation,
                 int64_t sample) {
  const TensorList signs(sign_list);
  check_indices(indices, signs.size());
  check_evaluation(evaluation);
  if (signs.empty()) return;
  const Tensor first = signs.tensor(0);
  signs.check_device(first);
  check_device(evaluation, first, "evaluation");
  const Scope scope(first);
  const Signs stream = signs_of(std::move(indices), seed, evaluation, sample);
  rademacher({"rademacher_", scope.stream()}, lengths_of(signs), memory_of(signs), stream);
  signs.write_back();
}

void hutchinson_(StableListHandle product_list, Tensor estimate, std::vector<int64_t> offsets,
                 std::vector<int64_t> indices, int64_t seed, Tensor evaluation, int64_t sample, int64_t samples) {
  const TensorList products(product_list);
  check_hutchinson(products, estimate, offsets, indices, evaluation);
  if (products.empty()) return;
  const Tensor first = products.tensor(0);
  products.check_device(first);
  check_device(estimate, first, "estimate");
  check_device(evaluation, first, "evaluation");
  const Scope scope(first);
  Estimate e{};
  e.numel = lengths_of(products);
  e.offsets = std::move(offsets);
  e.products = memory_of(products);
  e.estimate = estimate.mutable_data_ptr();
  e.signs = signs_of(std::move(indices), seed, evaluation, sample);
  e.first = sample == 0;
  e.divisor = sample == samples - 1 ? samples : 1;
  hutchinson({"hutchinson_", scope.stream()}, e);
}

void block_average_(StableListHandle product_list, Tensor exp_hessian, Tensor averaged, std::vector<int64_t> offsets,
                    int64_t blocked, std::vector<double> numbers) {
  const TensorList products(product_list);
  const Settings settings = settings_of(numbers);
  check_block_average(products, exp_hessian, averaged, offsets, blocked, settings);
  if (products.empty()) return;
  const Tensor first = products.tensor(0);
  products.check_device(first);
  check_device(exp_hessian, first, "exp_hessian");
  check_device(averaged, first, "averaged");
  const Scope scope(first);
  BlockAverage b{};
  b.numel = lengths_of(products);
  b.offsets = std::move(offsets);
  b.products = memory_of(products);
  b.exp_hessian = exp_hessian.const_data_ptr();
  b.averaged = averaged.mutable_data_ptr();
  b.blocked = blocked;
  b.settings = settings;
  block_average({"block_average_", scope.stream()}, b);
}

void update_(StableListHandle param_list, StableListHandle grad_list, StableListHandle product_list,
             std::optional<Tensor> averaged, std::optional<Tensor> backup, std::optional<Tensor> norm, Tensor exp_avg,
             std::optional<Tensor> exp_hessian, std::optional<Tensor> exp_avg_norm, Tensor steps, Tensor skipped,
             std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor layouts, int64_t blocked,
             std::vector<Tensor> guards, bool guard_grads, Tensor per_row, std::vector<double> numbers) {
  const TensorList params(param_list, layouts);
  const TensorList grads(grad_list, params);
  const bool hessian_step = list_size(product_list) > 0;
  const TensorList products = hessian_step ? TensorList(product_list, params) : TensorList(product_list);
  const Settings settings = settings_of(numbers);
  check_update(params, grads, products, averaged, backup, norm, exp_avg, exp_hessian, exp_avg_norm, steps, skipped,
               offsets, rows, blocked, per_row, settings);
  for (const TensorList* list : {&params, &grads, &products}) list->check_device(steps);
  if (averaged) check_device(*averaged, steps, "averaged");
  if (backup) check_device(*backup, steps, "backup");
  if (norm) check_device(*norm, steps, "norm");
  check_device(exp_avg, steps, "exp_avg");
  if (exp_hessian) check_device(*exp_hessian, steps, "exp_hessian");
  if (exp_avg_norm) check_device(*exp_avg_norm, steps, "exp_avg_norm");
  check_device(skipped, steps, "skipped");
  check_device(per_row, steps, "per_row");
  const Dtype dtype = dtype_of(exp_avg.scalar_type());
  const auto memory = [&](const TensorList& list) { return list.empty() ? Tensors{dtype, {}} : memory_of(list); };
  const Scope scope(steps);
  const Target target{"update_", scope.stream()};
  Update u{};
  u.numel = lengths_of(params);
  u.offsets = std::move(offsets);
  u.rows = std::move(rows);
  u.params = memory(params);
  u.grads = memory(grads);
  if (hessian_step) u.products = memory(products);
  u.averaged = averaged ? averaged->const_data_ptr() : nullptr;
  u.backup = backup ? backup->const_data_ptr() : nullptr;
  u.norm = norm ? static_cast<const double*>(norm->const_data_ptr()) : nullptr;
  u.exp_avg = exp_avg.mutable_data_ptr();
  u.exp_hessian = exp_hessian ? exp_hessian->mutable_data_ptr() : nullptr;
  u.exp_avg_norm = exp_avg_norm ? static_cast<double*>(exp_avg_norm->mutable_data_ptr()) : nullptr;
  u.blocked = blocked;
  u.steps = static_cast<int64_t*>(steps.mutable_data_ptr());
  u.per_row = row_settings(per_row);
  u.row_count = steps.size(0);
  u.skipped = static_cast<int64_t*>(skipped.mutable_data_ptr());
  for (const Tensor& guard : guards) {
    check_device(guard, steps, "a guard");
    u.guards.push_back(scalar_of(guard, "a guard"));
  }
  u.guard_grads = guard_grads;
  u.settings = settings;
  // Gradients, products, a launch for every few guards, and the squares of exp_avg.
  const int64_t more = static_cast<int64_t>(guards.size()) + 1 + (u.exp_avg_norm ? most_block_sums(target) : 0);
  const int64_t more_bytes = more * static_cast<int64_t>(sizeof(double));
  const Tensor sums = scratch(steps, 2 * sums_bytes(target, u.numel) + more_bytes);
  const Tensor prepared = scratch(steps, scratch_bytes(u.row_count));
  u.partial = partial_sums(sums);
  u.scratch = prepared.mutable_data_ptr();
  update(target, u);
  params.write_back();
}

}  // namespace
}  // namespace sassha::cuda

STABLE_TORCH_LIBRARY_IMPL(SASSHA_NAMESPACE, SASSHA_DISPATCH_KEY, m) {
  m.impl("grad_norm", TORCH_BOX(&sassha::cuda::grad_norm));
  m.impl("perturb_", TORCH_BOX(&sassha::cuda::perturb_));
  m.impl("rademacher_", TORCH_BOX(&sassha::cuda::rademacher_));
  m.impl("hutchinson_", TORCH_BOX(&sassha::cuda::hutchinson_));
  m.impl("block_average_", TORCH_BOX(&sassha::cuda::block_average_));
  m.impl("update_", TORCH_BOX(&sassha::cuda::update_));
}
