// The numbers that come with a call, as sassha_fused/settings.py names them: the same fields in the same order.
#pragma once

namespace sassha {

// What all parameters of a call share. Modes are numbers too: 0 is false.
struct Settings {
  double beta1;            // of exp_avg
  double beta2;            // of exp_hessian
  double eps;              // beside the root in the denominator
  double hessian_power;    // the exponent of exp_hessian
  double adaptive;         // whether eps* grows with w^2
  double maximize;         // whether the objective is to grow
  double bias_correction;  // a BiasCorrection
};

// What each parameter has of its own: a row of per_row.
struct RowSettings {
  double lr;
  double weight_decay;
  double rho;
};

}  // namespace sassha
