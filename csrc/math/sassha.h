// The arithmetic of one element of Sassha (Shin et al., ICML 2025, arXiv 2502.18153), for every backend in C++.
//
// T is the compute type: double for float64 parameters, float for float32, bfloat16 and float16 ones. Scalars are
// worked out in double and rounded to T once. Compiled without contraction, so each operation below is one IEEE
// rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "math/portable.h"
#include "math/power.h"

namespace sassha {

// rho / (N + 1e-12), the factor of the gradient in eps*, where N is finite; negative where the objective is maximised.
template <class T>
SASSHA_HOST_DEVICE T perturbation_scale(double rho, double norm, bool maximize) {
  const double scale = rho / (norm + 1e-12);
  return static_cast<T>(maximize ? -scale : scale);
}

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
// Numbered as in csrc/schema.cpp.
enum class BiasCorrection { kStep, kUpdate, kNone };

struct Hyperparameters {
  double lr, beta1, beta2, eps, weight_decay, hessian_power;
  BiasCorrection bias_correction;
  bool maximize;
};

// What all parameters of a step share.
struct UpdateConstants {
  double beta1;
  double gradient_weight;  // 1 - beta1, negative where the objective is maximised
  double beta2;
  double hessian_weight;  // 1 - beta2
  double eps;
  double power;
  SplitPower split_power;
};

SASSHA_HOST_DEVICE UpdateConstants update_constants(const Hyperparameters& h) {
  return {
      h.beta1,
      h.maximize ? -(1.0 - h.beta1) : 1.0 - h.beta1,
      h.beta2,
      1.0 - h.beta2,
      h.eps,
      h.hessian_power,
      split_power(h.hessian_power),
  };
}

template <class T, Power kPower>
SASSHA_HOST_DEVICE T raise(T x, const UpdateConstants& c) {
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
struct UpdateScalars {
  double decay;               // 1 - lr weight_decay
  double step_size;           // lr / c1
  double hessian_correction;  // 1 / c2
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
SASSHA_HOST_DEVICE int64_t next_hessian_step(BiasCorrection correction, int64_t step, int64_t hessian_step) {
  return correction == BiasCorrection::kStep ? step : hessian_step + 1;
}

// c1 = 1 - beta1^step, c2 = 1 - beta2^hessian_step, or both 1: the counts include the step being taken.
SASSHA_HOST_DEVICE UpdateScalars update_scalars(const Hyperparameters& h, int64_t step, int64_t hessian_step) {
  const bool corrected = h.bias_correction != BiasCorrection::kNone;
  const double correction1 = corrected ? 1.0 - integer_power(h.beta1, step) : 1.0;
  const double correction2 = corrected ? 1.0 - integer_power(h.beta2, hessian_step) : 1.0;
  return {1.0 - h.lr * h.weight_decay, h.lr / correction1, 1.0 / correction2};
}

// Sums and products go through double and are rounded to T once: in float they would add up to more than 4 ulp.
template <class T>
SASSHA_HOST_DEVICE T average(T mean, double beta, T x, double weight) {
  return static_cast<T>(beta * static_cast<double>(mean) + weight * static_cast<double>(x));
}

// D <- beta2 D + (1 - beta2) |H|
template <class T>
SASSHA_HOST_DEVICE T averaged_hessian(T exp_hessian, T hessian, const UpdateConstants& c) {
  return average(exp_hessian, c.beta2, std::fabs(hessian), c.hessian_weight);
}

// m <- beta1 m + (1 - beta1) g~
template <class T>
SASSHA_HOST_DEVICE T averaged_gradient(T exp_avg, T gradient, const UpdateConstants& c) {
  return average(exp_avg, c.beta1, gradient, c.gradient_weight);
}

// w (1 - lr weight_decay) - (lr / c1) m / ((D / c2)^power + eps); the root and the division, slow in double, in T.
template <class T, Power kPower>
SASSHA_HOST_DEVICE T updated(T w, T exp_avg, T exp_hessian, const UpdateConstants& c, const UpdateScalars& s) {
  const T corrected = static_cast<T>(static_cast<double>(exp_hessian) * s.hessian_correction);
  const T root = raise<T, kPower>(corrected, c);
  const T denominator = root + static_cast<T>(c.eps);
  const T direction = exp_avg / denominator;
  return static_cast<T>(static_cast<double>(w) * s.decay - s.step_size * static_cast<double>(direction));
}

}  // namespace sassha
