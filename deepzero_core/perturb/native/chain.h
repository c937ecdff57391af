// What follows a convolution, in one pass: normalisation, a residual, a rectifier and max-pooling, all as differences.
//
//   e = a*delta + c + d*(values - mean) + residual
//   rectified:  max(e + min(y, 0), -max(y, 0)),   with slope s for negative values  r + s*(e - r)
//   pooled:     e becomes max_j(e_j + (y_j - m)) and y becomes m = max_j y_j before the rectifier
//
// Behind a normalisation y need not be read from memory: y = gain*(values - mean) + bias.
#pragma once
#include "slices.h"

struct Link {  // one channel of a slice; null: there is no such term
  const float *delta, *values, *residual, *base;
  float a, c, d, mean;
  float gain, bias;  // where `base` is null
  float slope;
  float* out;
};

enum Terms { CENTRED = 1, RESIDUAL = 2, GIVEN_BASE = 4, RECTIFIED = 8 };

template <int TERMS>
static inline Vector moved(const Link& k, Index at) {
  Vector e = k.a * load(k.delta + at) + k.c;
  if constexpr (TERMS & CENTRED) e += k.d * (load(k.values + at) - k.mean);
  if constexpr (TERMS & RESIDUAL) e += load(k.residual + at);
  return e;
}

template <int TERMS>
static inline Vector base(const Link& k, Index at) {
  if constexpr (TERMS & GIVEN_BASE) return load(k.base + at);
  return k.gain * (load(k.values + at) - k.mean) + k.bias;
}

static inline Vector rectified(Vector e, Vector y, float slope) {
  const Vector zero = {};
  const Vector r = at_least(e + (zero < y ? zero : y), -(zero > y ? zero : y));
  return slope == 0 ? r : r + slope * (e - r);
}

template <int TERMS>
static void elementwise(const Link& k, Index length) {
  for (Index at = 0; at < length; at += LANES) {
    Vector e = moved<TERMS>(k, at);
    if constexpr (TERMS & RECTIFIED) e = rectified(e, base<TERMS>(k, at), k.slope);
    store(k.out + at, e);
  }
}

template <int TERMS>
static void pooled(const Link& k, const Shape& s) {
  float* out = k.out;
  for (Index oh = 0; oh < s.out_height; oh++) {
    const Taps v(oh, s.stride_h, s.pad_h, s.dilation_h, s.kernel_height, s.height);
    for (Index ow = 0; ow < s.out_width; ow++) {
      const Taps h(ow, s.stride_w, s.pad_w, s.dilation_w, s.kernel_width, s.width);
      const auto place = [&](Index kh, Index kw) {
        return ((oh * s.stride_h - s.pad_h + kh * s.dilation_h) * s.width + ow * s.stride_w - s.pad_w +
                kw * s.dilation_w) * LANES;
      };
      Vector most = base<TERMS>(k, place(v.first, h.first));
      for (Index kh = v.first; kh < v.last; kh++)
        for (Index kw = h.first; kw < h.last; kw++) most = larger(most, base<TERMS>(k, place(kh, kw)));
      Vector best = all(-__builtin_inff());
      for (Index kh = v.first; kh < v.last; kh++)
        for (Index kw = h.first; kw < h.last; kw++) {
          const Index at = place(kh, kw);
          best = larger(best, moved<TERMS>(k, at) + (base<TERMS>(k, at) - most));
        }
      if constexpr (TERMS & RECTIFIED) best = rectified(best, most, k.slope);
      store(out, best);
      out += LANES;
    }
  }
}

// `pool` null: no pooling.
static void evaluate(const Link& k, Index length, const Shape* pool, bool rectify) {
  const int terms = (k.values ? CENTRED : 0) | (k.residual ? RESIDUAL : 0) | (k.base ? GIVEN_BASE : 0) |
                    (rectify ? RECTIFIED : 0);
  with_constant<0, 15>(terms, [&](auto with) {
    if (pool)
      pooled<with>(k, *pool);
    else
      elementwise<with>(k, length);
  });
}
