// Every operator's schema, once. Backends register implementations; sassha_fused/eager.py mirrors the argument lists.
//
// Lists hold parameters of one device and dtype, and their gradients and products in any strides. State is flat:
// parameter i's part of every flat buffer starts at element offsets[i], a multiple of 128, and has its elements in
// memory order where the parameter is dense, else row-major. indices[i] is the index of its first element among all
// elements of the optimizer. What a parameter has of its own stands in row rows[i]: its counts (step, hessian_step) in
// steps, its numbers (csrc/math/settings.h) in per_row, float64 on the device. layouts, int64 on the CPU, has a row for
// each parameter of the list: its dimensions, its shape, its strides as its part of the state was made; what has
// another shape or other strides now is refused. settings are the numbers that all of them share. Below the element
// `blocked` of the flat state each block of hessian_block elements has one exp_hessian, from there on each element.

#include "library.h"

SASSHA_LIBRARY(SASSHA_NAMESPACE, m) {
  // ||g||, or || |w| . g || if adaptive: a 0-d float64 tensor; non-finite where any element is. params may be left
  // empty where not adaptive; where given, gradients that do not fit them are refused, and with layouts params as well.
  m.def("grad_norm(Tensor[] grads, Tensor[] params, Tensor? layouts, bool adaptive) -> Tensor");

  // backup <- w, where there is one;  w <- w + eps*,  eps* = rho g / (norm + 1e-12), times w^2 if adaptive, negated if
  // maximize or where the ascent is along exp_avg, whose parts g then are: in the dtype of the state. norm is a 0-d
  // float64 tensor: that of all gradients, or if measure that of grads, which is worked out first and put there. Where
  // it is not finite, w stays as it is: a forward pass at weights that are NaN would ruin batch-norm statistics.
  m.def(
      "perturb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)? backup, int[] offsets, int[] rows, Tensor layouts, "
      "Tensor(c!) norm, bool measure, Tensor per_row, float[] settings) -> ()");

  // signs <- the independent +-1 of sample `sample` (csrc/math/philox.h) in a Hessian evaluation, whose index is in the
  // int64 `evaluation`.
  m.def("rademacher_(Tensor(a!)[] signs, int[] indices, int seed, Tensor evaluation, int sample) -> ()");

  // estimate <- (sample == 0 ? 0 : estimate) + z . Hz;  after the last sample: divided by samples. Products lie in the
  // order of the state.
  m.def(
      "hutchinson_(Tensor[] products, Tensor(a!) estimate, int[] offsets, int[] indices, int seed, Tensor evaluation, "
      "int sample, int samples) -> ()");

  // averaged <- exp_hessian with the means of |products| over blocks averaged in (csrc/math/sassha.h): what is
  // exp_hessian once the step is known to be taken. Sums of a block go pairwise: neighbours, then pairs of neighbours.
  // Missing elements of a parameter's last block count as 0, and the mean is that of those present.
  m.def(
      "block_average_(Tensor[] products, Tensor exp_hessian, Tensor(a!) averaged, int[] offsets, int blocked, "
      "float[] settings) -> ()");

  // One step (csrc/math/sassha.h) from w = backup, or without backup from params; or with norm, that of perturb_ along
  // exp_avg, from what params were before it. products, if any, are this step's Hessian estimates; averaged, if any,
  // what block_average_ made of them. exp_avg_norm, if any and without products, <- the norm of exp_avg over these
  // parameters, of which there is one at least. Where any of the scalars in guards, or if guard_grads any element of
  // grads or products, is not finite: params <- w, skipped <- 1, and nothing else is written. norm and a guard may be
  // exp_avg_norm itself.
  m.def(
      "update_(Tensor(a!)[] params, Tensor[] grads, Tensor[] products, Tensor? averaged, Tensor? backup, Tensor? norm, "
      "Tensor(b!) exp_avg, Tensor(c!)? exp_hessian, Tensor(d!)? exp_avg_norm, Tensor(e!) steps, Tensor(f!) skipped, "
      "int[] offsets, int[] rows, Tensor layouts, int blocked, Tensor[] guards, bool guard_grads, Tensor per_row, "
      "float[] settings) -> ()");
}
