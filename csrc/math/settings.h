// The numbers that come with a call, as sassha_fused/settings.py names them: the same fields in the same order.
#pragma once

namespace sassha {

// What all parameters of a call share. Modes are numbers too: 0 is false.
struct Settings {
  double beta1;            // of exp_avg: SGD's momentum
  double beta2;            // of exp_hessian
  double eps;              // beside the root in the denominator
  double hessian_power;    // the exponent of exp_hessian
  double adaptive;         // whether eps* grows with w^2
  double maximize;         // whether the objective is to grow
  double bias_correction;  // a BiasCorrection
  double ascent;           // an Ascent
  double second_average;   // a SecondAverage
  double direction;        // a Direction
  double clip_threshold;   // of a clipped direction: the factor of exp_hessian
  double dampening;        // of a plain direction: what exp_avg leaves out of gradients behind its first
  double nesterov;         // of a plain direction: whether it looks one step of exp_avg ahead
  double hessian_block;    // how many elements share one of exp_hessian: a power of 2, at most 128
};

// What each parameter has of its own: a row of per_row.
struct RowSettings {
  double lr;
  double weight_decay;
  double rho;
};

}  // namespace sassha
