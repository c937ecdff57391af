// Activations f as differences f(y + d) - f(y) that round relative to d. What they are made of, with s = sigmoid(y):
//
//   sigmoid     s*(1 - s)*expm1(d) / (1 - s + s*exp(d))                  where d is large, the difference of values
//   max(y, 0)   r = max(d + min(y, 0), -max(y, 0)),   of min(y, 0): d - r
//   clamp       k = clamp(y):  clamp(d + (y - k), low - k, high - k)
//   normal CDF  its density integrated from y to y + d by three nodes of Gauss and Legendre; likewise
//   a*b         da*b + (a + da)*db
#pragma once
#include <cmath>

#include "chain.h"

enum Function : Index { SIGMOID, TANH, SILU, GELU, GELU_TANH, ELU, CLAMP, HARD_SIGMOID, HARD_SWISH };

struct Parameters {  // of ELU: factor, scale and input scale; of CLAMP: low and high
  float a, b, c;
};

static inline Vector at_most(Vector value, Vector ceiling) { return value > ceiling ? ceiling : value; }

// Whether some |d| exceeds a limit; not where it is NaN.
static inline bool any_beyond(Vector d, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)d), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  for (int lane = 0; lane < LANES; lane++)
    if (std::fabs(d[lane]) > limit) return true;
  return false;
#endif
}

static inline Vector beyond(Vector d, float limit, Vector value, Vector otherwise) {
  return (d > limit) | (d < -limit) ? value : otherwise;
}

struct Exponential {  // exp(x) = scale*(1 + rest)
  Vector scale, rest;
  Vector value() const { return scale + scale * rest; }
  Vector minus_one() const { return (scale - 1) + scale * rest; }
};

// x = n*log 2 + r with |r| <= (log 2)/2, and expm1(r) as a Taylor polynomial, to 2e-8. x in [-87, 88] or NaN.
static inline Exponential exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
  x = at_least(at_most(x, all(88.0f)), all(-87.0f));
  const Vector shifted = x * 1.44269504f;
  const Integers n = __builtin_convertvector(shifted + (shifted < 0 ? all(-0.5f) : all(0.5f)), Integers);
  const Vector whole = __builtin_convertvector(n, Vector);
  const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector p = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2}) p = c + p * r;
  return {(Vector)((n + 127) << 23), r + p * r * r};
}

struct Sigmoid {
  Vector value, moved;
  Sigmoid(Vector y, Vector d) {
    const Vector inverse = exponential(-y).value();
    value = 1 / (1 + inverse);
    const Vector other = inverse * value;  // sigmoid(-y)
    const Exponential e = exponential(d);
    moved = value * e.minus_one() * other / (other + value * e.value());
    if (any_beyond(d, 1)) moved = beyond(d, 1, 1 / (1 + exponential(-y - d).value()) - value, moved);
  }
};

static inline Vector density(Vector y) { return 0.398942280f * exponential(-0.5f * y * y).value(); }

// To 1e-7 (Abramowitz and Stegun 1964, 7.1.26).
static inline Vector normal(Vector y) {
  const Vector size = y < 0 ? -y : y;
  const Vector t = 1 / (1 + 0.2316418903f * size);
  Vector p = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = c + p * t;
  const Vector tail = 0.5f * p * t * exponential(-0.5f * y * y).value();
  return y < 0 ? tail : 1 - tail;
}

static inline Vector normal_moved(Vector y, Vector d) {
  constexpr float LARGE = 0.7f, NODE = 0.387298335f;
  const Vector middle = y + 0.5f * d;
  const Vector sum = 5 * (density(middle - NODE * d) + density(middle + NODE * d)) + 8 * density(middle);
  const Vector integrated = d * sum / 18;
  return any_beyond(d, LARGE) ? beyond(d, LARGE, normal(y + d) - normal(y), integrated) : integrated;
}

static inline Vector clamped(Vector y, Vector d, float low, float high) {
  const Vector k = at_least(at_most(y, all(high)), all(low));
  return at_most(at_least(d + (y - k), low - k), high - k);
}

template <int FUNCTION>
static inline Vector activation(Vector y, Vector d, const Parameters& with) {
  if constexpr (FUNCTION == SIGMOID) return Sigmoid(y, d).moved;
  if constexpr (FUNCTION == TANH) return 2 * Sigmoid(2 * y, 2 * d).moved;
  if constexpr (FUNCTION == SILU) {
    const Sigmoid s(y, d);
    return d * s.value + (y + d) * s.moved;
  }
  if constexpr (FUNCTION == GELU) return d * normal(y) + (y + d) * normal_moved(y, d);
  if constexpr (FUNCTION == GELU_TANH) {  // y*sigmoid(2u) with u = sqrt(2/pi)*(y + k*y^3)
    constexpr float FACTOR = 1.59576912f, K = 0.044715f;
    const Sigmoid s(FACTOR * y * (1 + K * y * y), FACTOR * d * (1 + K * (3 * y * (y + d) + d * d)));
    return d * s.value + (y + d) * s.moved;
  }
  if constexpr (FUNCTION == ELU) {
    const Vector zero = {}, negative = zero < y ? zero : y;
    const Vector r = rectified(d, y, 0);
    const Vector below = exponential(with.c * negative).value() * exponential(with.c * (d - r)).minus_one();
    return with.b * (r + with.a * below);
  }
  if constexpr (FUNCTION == CLAMP) return clamped(y, d, with.a, with.b);
  if constexpr (FUNCTION == HARD_SIGMOID) return clamped(y, d, -3, 3) / 6;
  const Vector gate = at_least(at_most(y, all(3)), all(-3)) + 3;
  return (d * gate + (y + d) * clamped(y, d, -3, 3)) / 6;
}

// One channel of a slice: what follows k.delta, y as in `base`.
template <int FUNCTION>
static void activated(const Link& k, const Parameters& with, Index length) {
  for (Index at = 0; at < length; at += LANES) {
    const Vector y = k.base ? base<GIVEN_BASE>(k, at) : base<0>(k, at);
    store(k.out + at, activation<FUNCTION>(y, load(k.delta + at), with));
  }
}

static void activate(Index function, const Link& k, const Parameters& with, Index length) {
  with_constant<SIGMOID, HARD_SWISH>(function, [&](auto f) { activated<f>(k, with, length); });
}
