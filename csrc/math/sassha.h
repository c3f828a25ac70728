// The arithmetic of one element of Sassha (Shin et al., ICML 2025, arXiv 2502.18153), for every backend in C++.
//
// T is the compute type: double for float64 parameters, float for float32, bfloat16 and float16 ones. Scalars are
// worked out in double, once per parameter. Compiled without contraction, so each operation below is one IEEE rounding,
// and so is each explicit fused multiply-add: the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "math/portable.h"
#include "math/power.h"
#include "math/settings.h"

namespace sassha {

// A number as the sum of two of the compute type: a float alone would be off by up to half a ulp, the same way in every
// step. Of double the first is the number.
template <class T>
struct Parts {
  T high, low;
};

template <class T>
SASSHA_HOST_DEVICE Parts<T> parts_of(double x) {
  const T high = static_cast<T>(x);
  return {high, static_cast<T>(x - static_cast<double>(high))};
}

// rho / (N + 1e-12), the factor of the gradient in eps*, where N is finite; negative where the objective is maximised.
// inverse: 1 / (N + 1e-12), of which a launch has but one.
template <class T>
SASSHA_HOST_DEVICE T perturbation_scale(double rho, double inverse, const Settings& settings) {
  const double scale = rho * inverse;
  return static_cast<T>(settings.maximize != 0 ? -scale : scale);
}

SASSHA_HOST_DEVICE double inverse_norm(double norm) { return 1.0 / (norm + 1e-12); }

// w + eps*
template <class T, bool kAdaptive>
SASSHA_HOST_DEVICE T perturbed(T w, T g, T scale) {
  const T step = scale * g;
  return kAdaptive ? w + step * (w * w) : w + step;
}

enum class Power { kSquareRoot, kIdentity, kGeneral };

SASSHA_HOST_DEVICE Power power_of(double hessian_power) {
  return hessian_power == 0.5 ? Power::kSquareRoot : hessian_power == 1.0 ? Power::kIdentity : Power::kGeneral;
}

// What c2 counts: the steps up to the last Hessian step, as published, or the Hessian steps alone. kNone: c1 = c2 = 1.
// Numbered as in sassha_fused/checks.py.
enum class BiasCorrection { kStep, kUpdate, kNone };

SASSHA_HOST_DEVICE bool corrects(const Settings& settings, BiasCorrection correction) {
  return settings.bias_correction == static_cast<double>(correction);
}

// What all parameters of a step share.
template <class T>
struct UpdateConstants {
  Parts<T> beta1;
  Parts<T> gradient_weight;  // 1 - beta1, negative where the objective is maximised
  Parts<T> beta2;
  Parts<T> hessian_weight;  // 1 - beta2
  T eps;
  double power;
  SplitPower split_power;
};

template <class T>
SASSHA_HOST_DEVICE UpdateConstants<T> update_constants(const Settings& s) {
  return {
      parts_of<T>(s.beta1),         parts_of<T>(s.maximize != 0 ? -(1.0 - s.beta1) : 1.0 - s.beta1),
      parts_of<T>(s.beta2),         parts_of<T>(1.0 - s.beta2),
      static_cast<T>(s.eps),        s.hessian_power,
      split_power(s.hessian_power),
  };
}

template <class T, Power kPower>
SASSHA_HOST_DEVICE T raise(T x, const UpdateConstants<T>& c) {
  if constexpr (kPower == Power::kSquareRoot) {
    return std::sqrt(x);
  } else if constexpr (kPower == Power::kIdentity) {
    return x;
  } else if constexpr (std::is_same_v<T, float>) {
    return raised(x, c.split_power);
  } else {
    // The error, 2^-52 times the logarithm, is a few ulp; pow, which has none, takes a third more of a GPU's registers.
    return std::exp2(c.power * std::log2(x));
  }
}

// What stays the same over one parameter's elements in one step.
template <class T>
struct UpdateScalars {
  Parts<T> decay;               // 1 - lr weight_decay
  Parts<T> step_size;           // lr / c1
  Parts<T> hessian_correction;  // 1 / c2
};

// base^exponent, of an exponent of 0 or more, by repeated squaring in twice the precision of double: the libraries'
// pow differ in the last bit from one to the next.
SASSHA_HOST_DEVICE double integer_power(double base, int64_t exponent) {
  double high = 1.0, low = 0.0, square_high = base, square_low = 0.0;
  const auto multiply = [](double& a, double& a_low, double b, double b_low) {
    const double product = a * b;
    const double rest = std::fma(a, b, -product) + (a * b_low + a_low * b);
    a = product + rest;
    a_low = rest - (a - product);
  };
  for (uint64_t bits = static_cast<uint64_t>(exponent); bits != 0; bits >>= 1) {
    if (bits & 1) multiply(high, low, square_high, square_low);
    multiply(square_high, square_low, square_high, square_low);
  }
  return high;
}

// The count hessian_step behind a Hessian step, which is the step-th step.
SASSHA_HOST_DEVICE int64_t next_hessian_step(const Settings& settings, int64_t step, int64_t hessian_step) {
  return corrects(settings, BiasCorrection::kStep) ? step : hessian_step + 1;
}

// c1 = 1 - beta1^step, c2 = 1 - beta2^hessian_step, or both 1: the counts include the step being taken.
template <class T>
SASSHA_HOST_DEVICE UpdateScalars<T> update_scalars(const Settings& settings, const RowSettings& row, int64_t step,
                                                   int64_t hessian_step) {
  const bool corrected = !corrects(settings, BiasCorrection::kNone);
  const double correction1 = corrected ? 1.0 - integer_power(settings.beta1, step) : 1.0;
  const double correction2 = corrected ? 1.0 - integer_power(settings.beta2, hessian_step) : 1.0;
  return {
      parts_of<T>(1.0 - row.lr * row.weight_decay),
      parts_of<T>(row.lr / correction1),
      parts_of<T>(1.0 / correction2),
  };
}

// beta mean + weight x. Of double in three roundings, as plain torch has it; of float the parts come first, which are
// below a ulp, then the smaller term and the larger.
SASSHA_HOST_DEVICE double average(double mean, Parts<double> beta, double x, Parts<double> weight) {
  return beta.high * mean + weight.high * x;
}
SASSHA_HOST_DEVICE float average(float mean, Parts<float> beta, float x, Parts<float> weight) {
  const float rest = std::fma(beta.low, mean, weight.low * x);
  return std::fma(beta.high, mean, std::fma(weight.high, x, rest));
}

// D <- beta2 D + (1 - beta2) |H|
template <class T>
SASSHA_HOST_DEVICE T averaged_hessian(T exp_hessian, T hessian, const UpdateConstants<T>& c) {
  return average(exp_hessian, c.beta2, std::fabs(hessian), c.hessian_weight);
}

// m <- beta1 m + (1 - beta1) g~
template <class T>
SASSHA_HOST_DEVICE T averaged_gradient(T exp_avg, T gradient, const UpdateConstants<T>& c) {
  return average(exp_avg, c.beta1, gradient, c.gradient_weight);
}

// D / c2
SASSHA_HOST_DEVICE double corrected(double exp_hessian, Parts<double> correction) {
  return exp_hessian * correction.high;
}
SASSHA_HOST_DEVICE float corrected(float exp_hessian, Parts<float> correction) {
  return std::fma(correction.high, exp_hessian, correction.low * exp_hessian);
}

// decay w - step_size direction
SASSHA_HOST_DEVICE double moved(double w, double direction, const UpdateScalars<double>& s) {
  return w * s.decay.high - s.step_size.high * direction;
}
SASSHA_HOST_DEVICE float moved(float w, float direction, const UpdateScalars<float>& s) {
  const float rest = std::fma(s.decay.low, w, -(s.step_size.low * direction));
  return std::fma(s.decay.high, w, std::fma(-s.step_size.high, direction, rest));
}

// w (1 - lr weight_decay) - (lr / c1) m / ((D / c2)^power + eps)
template <class T, Power kPower>
SASSHA_HOST_DEVICE T updated(T w, T exp_avg, T exp_hessian, const UpdateConstants<T>& c, const UpdateScalars<T>& s) {
  const T root = raise<T, kPower>(corrected(exp_hessian, s.hessian_correction), c);
  return moved(w, exp_avg / (root + c.eps), s);
}

}  // namespace sassha
