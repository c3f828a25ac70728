// x^power of a float, in float alone, as 2^(power log2(x)). The worst of a billion was 1.3 ulp from the true value.
//
// Every operation is one IEEE rounding, fused multiply-adds among them, and there are no branches: the same bits from
// every compiler, and loops that vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/portable.h"

namespace sassha {

// A power in (0, 1] as the sum of two floats. The first has 16 digits, so that its product with the exponent of a
// float, which has 8, is exact.
struct SplitPower {
  float high, low;
};

SASSHA_HOST_DEVICE SplitPower split_power(double power) {
  const double scaled = power * (0x1p37 + 1.0);  // Veltkamp: leaves 53 - 37 digits
  const double high = scaled - (scaled - power);
  return {static_cast<float>(high), static_cast<float>(power - high)};
}

SASSHA_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SASSHA_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// c0 + x (c1 + x (c2 + ...))
SASSHA_HOST_DEVICE float polynomial(float, float c) { return c; }

template <class... Rest>
SASSHA_HOST_DEVICE float polynomial(float x, float c, Rest... rest) {
  return std::fma(x, polynomial(x, rest...), c);
}

// The coefficients are minimax (least squares, reweighted), in float64, each rounded to float before the next are
// fitted.

// log2(1 + t) / t - 1, for 1 + t from sqrt(1/2) to sqrt(2); t times the error is at most 7e-9.
SASSHA_HOST_DEVICE float log2_polynomial(float t) {
  return polynomial(t, 0x1.c551cep-2f, -0x1.71546ap-1f, 0x1.ec76e0p-2f, -0x1.716096p-2f, 0x1.2690f0p-2f,
                    -0x1.e8874ep-3f, 0x1.bd24a8p-3f, -0x1.ae793ap-3f, 0x1.00b592p-3f);
}

// (2^r - 1) / r, for |r| up to .502; r times the error is at most 4e-9 of 2^r.
SASSHA_HOST_DEVICE float exp2_polynomial(float r) {
  return polynomial(r, 0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6af78p-5f, 0x1.3b2de0p-7f, 0x1.5f0b1cp-10f,
                    0x1.416eb8p-13f);
}

// x^power, of x >= 0 or NaN.
SASSHA_HOST_DEVICE float raised(float x, SplitPower power) {
  constexpr uint32_t kExponent = 1u << 23;  // 1 in the exponent of a float
  constexpr uint32_t kSquareRootOfHalf = 0x3F3504F3;
  constexpr float kRound = 0x1.8p23f;  // added to a float, leaves it no digits behind the point

  // x = 2^exponent (1 + t). Numbers below the normal ones are worked out 2^24 times as large.
  const bool tiny = x < 0x1p-126f;
  const uint32_t lift = tiny ? 24 * kExponent : 0;
  const uint32_t bits = bits_of(tiny ? x * 0x1p24f : x) - lift;
  const uint32_t exponent_bits = (bits - kSquareRootOfHalf) & -kExponent;
  const float exponent = static_cast<float>(static_cast<int32_t>(exponent_bits));  // times 2^23
  const float t = float_of(bits - exponent_bits) - 1.0f;
  const float fraction = std::fma(t, log2_polynomial(t), t);
  const float log2 = std::fma(exponent, 0x1p-23f, fraction);

  // power log2(x) = whole + rest. The remainder of power.high times the exponent is exact, so that log2, which is
  // rounded, is multiplied by power.low alone.
  const float rounded = std::fma(power.high, log2, kRound);
  const float whole = rounded - kRound;
  const float remainder = std::fma(power.high * 0x1p-23f, exponent, -whole);
  const float rest = std::fma(power.high, fraction, std::fma(power.low, log2, remainder));

  // The last digits of rounded are those of whole, and the result's exponent.
  const float mantissa = std::fma(rest, exp2_polynomial(rest), 1.0f);
  const float lifted = float_of(bits_of(mantissa) + (bits_of(rounded) << 23) + lift);
  const float result = tiny ? lifted * 0x1p-24f : lifted;
  // 0, infinity and NaN are their own powers, and the only ones that are not less than their double.
  return x < x + x ? result : x;
}

}  // namespace sassha
