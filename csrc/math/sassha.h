// The arithmetic of one element, for every backend in C++: Sassha (Shin et al., ICML 2025, arXiv 2502.18153) and the
// rest of the family, which differ in the numbers of Settings.
//
// T is the compute type: double for float64 parameters, float for float32, bfloat16 and float16 ones. Scalars are
// worked out in double, once per parameter. Compiled without contraction, so each operation below is one IEEE rounding,
// and so is each explicit fused multiply-add: the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
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

// Whether a mode has this value; they are numbered as in sassha_fused/settings.py.
template <class Mode>
SASSHA_HOST_DEVICE bool is(double mode, Mode value) {
  return mode == static_cast<double>(value);
}

// What eps* points along: the gradient, or from exp_avg away, which has the sign of what is minimised.
enum class Ascent { kGradient, kMomentum };

// rho / (N + 1e-12), the factor of what eps* points along, where N is finite; negative where that leads down.
// inverse: 1 / (N + 1e-12), of which a launch has but one.
template <class T>
SASSHA_HOST_DEVICE T perturbation_scale(double rho, double inverse, const Settings& settings) {
  const double scale = rho * inverse;
  return static_cast<T>(settings.maximize != 0 || is(settings.ascent, Ascent::kMomentum) ? -scale : scale);
}

SASSHA_HOST_DEVICE double inverse_norm(double norm) { return 1.0 / (norm + 1e-12); }

// w + eps*
template <class T, bool kAdaptive>
SASSHA_HOST_DEVICE T perturbed(T w, T g, T scale) {
  const T step = scale * g;
  return kAdaptive ? w + step * (w * w) : w + step;
}

// w as it was before it became w + eps*, to rounding.
template <class T>
SASSHA_HOST_DEVICE T unperturbed(T w, T m, T scale) {
  return w - scale * m;
}

// What c2 counts: the steps up to the last Hessian step, as published, or the Hessian steps alone. kNone: c1 = c2 = 1.
enum class BiasCorrection { kStep, kUpdate, kNone };

// What exp_hessian averages: |H|, H^2, H, or in every step the squares of the gradients, as Adam does.
enum class SecondAverage { kAbsolute, kSquare, kSigned, kGradient };

// Where a step leads: along exp_avg over the root of exp_hessian, along the clipped quotient of both, or along exp_avg.
enum class Direction { kScaled, kClipped, kPlain };

// The same, with a kernel for each power that has a quicker way.
enum class Kind { kSquareRoot, kIdentity, kGeneral, kClipped, kPlain };

SASSHA_HOST_DEVICE Kind kind_of(const Settings& s) {
  if (is(s.direction, Direction::kPlain)) return Kind::kPlain;
  if (is(s.direction, Direction::kClipped)) return Kind::kClipped;
  return s.hessian_power == 0.5 ? Kind::kSquareRoot : s.hessian_power == 1.0 ? Kind::kIdentity : Kind::kGeneral;
}

// Whether a step writes exp_hessian.
SASSHA_HOST_DEVICE bool averages_second(const Settings& s, bool has_products) {
  return has_products || (is(s.second_average, SecondAverage::kGradient) && !is(s.direction, Direction::kPlain));
}

// What all parameters of a step share.
template <class T>
struct UpdateConstants {
  Parts<T> beta1;
  Parts<T> gradient_weight;  // 1 - beta1, negative where the objective is maximised
  Parts<T> beta2;
  Parts<T> hessian_weight;  // 1 - beta2, negative where the objective is maximised and its Hessian keeps its sign
  T eps;
  T clip_threshold;
  double power;
  SplitPower split_power;
  // Modes, 0 for off: of bool they would keep g++ from vectorising the loops that ask for them.
  T squares, is_signed, maximize, nesterov;
};

template <class T>
SASSHA_HOST_DEVICE UpdateConstants<T> update_constants(const Settings& s) {
  const bool maximize = s.maximize != 0, is_signed = is(s.second_average, SecondAverage::kSigned);
  UpdateConstants<T> c;
  c.beta1 = parts_of<T>(s.beta1);
  c.gradient_weight = parts_of<T>(maximize ? -(1.0 - s.beta1) : 1.0 - s.beta1);
  c.beta2 = parts_of<T>(s.beta2);
  c.hessian_weight = parts_of<T>(maximize && is_signed ? -(1.0 - s.beta2) : 1.0 - s.beta2);
  c.eps = static_cast<T>(s.eps);
  c.clip_threshold = static_cast<T>(s.clip_threshold);
  c.power = s.hessian_power;
  c.split_power = split_power(s.hessian_power);
  c.squares = is(s.second_average, SecondAverage::kSquare) || is(s.second_average, SecondAverage::kGradient);
  c.is_signed = is_signed;
  c.maximize = maximize;
  c.nesterov = s.nesterov != 0;
  return c;
}

template <class T, Kind kKind>
SASSHA_HOST_DEVICE T raise(T x, const UpdateConstants<T>& c) {
  if constexpr (kKind == Kind::kSquareRoot) {
    return std::sqrt(x);
  } else if constexpr (kKind == Kind::kIdentity) {
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
  Parts<T> decay;      // 1 - lr weight_decay; of a plain direction, whose gradient has the decay in it, weight_decay
  Parts<T> step_size;  // lr / c1
  Parts<T> factor;     // of exp_hessian, 1 / c2; of a plain direction, which has none, that of the gradient in exp_avg
  T perturbation;      // the factor of exp_avg in eps*, where w is worked out from w'
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
  return is(settings.bias_correction, BiasCorrection::kStep) ? step : hessian_step + 1;
}

// c1 = 1 - beta1^step, c2 = 1 - beta2^hessian_step, or both 1: the counts include the step being taken. inverse: as in
// perturbation_scale; 0 where w is not worked out from w'.
template <class T>
SASSHA_HOST_DEVICE UpdateScalars<T> update_scalars(const Settings& settings, const RowSettings& row, double inverse,
                                                   int64_t step, int64_t hessian_step) {
  const T perturbation = perturbation_scale<T>(row.rho, inverse, settings);
  if (is(settings.direction, Direction::kPlain)) {
    const double weight = step == 1 ? 1.0 : 1.0 - settings.dampening;
    return {parts_of<T>(row.weight_decay), parts_of<T>(row.lr), parts_of<T>(weight), perturbation};
  }
  const bool corrected = !is(settings.bias_correction, BiasCorrection::kNone);
  const double correction1 = corrected ? 1.0 - integer_power(settings.beta1, step) : 1.0;
  const double correction2 = corrected ? 1.0 - integer_power(settings.beta2, hessian_step) : 1.0;
  return {
      parts_of<T>(1.0 - row.lr * row.weight_decay),
      parts_of<T>(row.lr / correction1),
      parts_of<T>(1.0 / correction2),
      perturbation,
  };
}

// factor x + y. Of double in two roundings, as plain torch has it; of float the part that is below a ulp comes first.
SASSHA_HOST_DEVICE double times_plus(double x, Parts<double> factor, double y) { return factor.high * x + y; }
SASSHA_HOST_DEVICE float times_plus(float x, Parts<float> factor, float y) {
  return std::fma(factor.high, x, std::fma(factor.low, x, y));
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

// A square beyond T counts as this: of infinity the average would be NaN.
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

// D <- beta2 D + (1 - beta2) |H|, or H^2, or H
template <class T>
SASSHA_HOST_DEVICE T averaged_hessian(T exp_hessian, T hessian, const UpdateConstants<T>& c) {
  const T magnitude = c.is_signed != 0 ? hessian : std::fabs(hessian);
  const T square = magnitude * magnitude;
  // Whether it is used or not: g++ vectorises no condition within another.
  const T finite = square < kLargest<T> ? square : kLargest<T>;
  const T value = c.squares == 0 ? magnitude : finite;
  return average(exp_hessian, c.beta2, value, c.hessian_weight);
}

// D / c2
SASSHA_HOST_DEVICE double corrected(double exp_hessian, Parts<double> correction) {
  return exp_hessian * correction.high;
}
SASSHA_HOST_DEVICE float corrected(float exp_hessian, Parts<float> correction) {
  return std::fma(correction.high, exp_hessian, correction.low * exp_hessian);
}

// gamma max(D, 0) + e
SASSHA_HOST_DEVICE double clip_denominator(double exp_hessian, const UpdateConstants<double>& c) {
  return c.clip_threshold * (exp_hessian > 0 ? exp_hessian : 0) + c.eps;
}
SASSHA_HOST_DEVICE float clip_denominator(float exp_hessian, const UpdateConstants<float>& c) {
  return std::fma(c.clip_threshold, exp_hessian > 0 ? exp_hessian : 0, c.eps);
}

// decay w - step_size direction
SASSHA_HOST_DEVICE double moved(double w, double direction, Parts<double> decay, Parts<double> step_size) {
  return w * decay.high - step_size.high * direction;
}
SASSHA_HOST_DEVICE float moved(float w, float direction, Parts<float> decay, Parts<float> step_size) {
  const float rest = std::fma(decay.low, w, -(step_size.low * direction));
  return std::fma(decay.high, w, std::fma(-step_size.high, direction, rest));
}

// One step of an element: m and D as they are behind it are put into exp_avg and, if kSecond, exp_hessian; returns w.
//
//   m <- beta1 m + (1 - beta1) g,  w (1 - lr weight_decay) - (lr / c1) m / ((D / c2)^power + eps)
//   or, clipped, with m / (gamma max(D, 0) + eps) between -1 and 1
//   or, plain, with g + weight_decay w for g, m <- momentum m + factor g,  w - lr m, or w - lr (g + momentum m)
template <class T, Kind kKind, bool kSecond>
SASSHA_HOST_DEVICE T updated(T w, T g, T hessian, T& exp_avg, T& exp_hessian, const UpdateConstants<T>& c,
                             const UpdateScalars<T>& s) {
  if constexpr (kKind == Kind::kPlain) {
    const T gradient = times_plus(w, s.decay, c.maximize != 0 ? -g : g);
    exp_avg = average(exp_avg, c.beta1, gradient, s.factor);
    const T direction = c.nesterov != 0 ? times_plus(exp_avg, c.beta1, gradient) : exp_avg;
    return moved(w, direction, {1, 0}, s.step_size);
  } else {
    exp_avg = average(exp_avg, c.beta1, g, c.gradient_weight);
    if constexpr (kSecond) exp_hessian = averaged_hessian(exp_hessian, hessian, c);
    if constexpr (kKind == Kind::kClipped) {
      const T quotient = exp_avg / clip_denominator(exp_hessian, c);
      const T clipped = quotient > 1 ? 1 : quotient < -1 ? -1 : quotient;
      return moved(w, clipped, s.decay, s.step_size);
    } else {
      const T root = raise<T, kKind>(corrected(exp_hessian, s.factor), c);
      return moved(w, exp_avg / (root + c.eps), s.decay, s.step_size);
    }
  }
}

// Where the flat state's elements have their exp_hessian: those below `end` one for each block, the others their own.
struct Blocks {
  int shift;  // the block's length is 2^shift
  int64_t end;

  SASSHA_HOST_DEVICE int shift_of(int64_t element) const { return element < end ? shift : 0; }

  SASSHA_HOST_DEVICE int64_t index(int64_t element) const {
    return element < end ? element >> shift : (end >> shift) + (element - end);
  }
};

SASSHA_HOST_DEVICE Blocks blocks_of(const Settings& settings, int64_t end) {
  Blocks blocks{0, end};
  while (static_cast<double>(int64_t{1} << blocks.shift) < settings.hessian_block) ++blocks.shift;
  return blocks;
}

}  // namespace sassha
