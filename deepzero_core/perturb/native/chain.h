// What follows a convolution, in one pass: normalisation, a residual, a rectifier and max-pooling, all as differences.
//
//   e = a*delta + c + d*(values - mean) + residual
//   rectified:  max(e + min(y, 0), -max(y, 0)),   with slope s for negative values  r + s*(e - r)
//   pooled:     e becomes max_j(e_j + (y_j - m)) and y becomes m = max_j y_j before the rectifier
#pragma once
#include "convolution.h"

struct Chain {
  Index channels, length, batch;  // length: positions in space
  const float *delta, *values, *residual, *base;
  const float *a, *c, *d;  // [P, channels]; null: 1, 0, 0
  const float* mean;       // of each base channel; null: 0
  const Index* start;      // the first channel of each perturbation in the base values
  float slope;
  float* out;
};

struct Coefficients {  // of one perturbation and channel, in every lane
  Vector a, c, d, mean;
};

template <bool CENTRED, bool RESIDUAL>
static inline Vector moved(const Chain& k, Index at, Index base_at, const Coefficients& with) {
  Vector e = with.a * load(k.delta + at) + with.c;
  if constexpr (CENTRED) e += with.d * (load(k.values + base_at) - with.mean);
  if constexpr (RESIDUAL) e += load(k.residual + at);
  return e;
}

static inline Vector rectified(Vector e, Vector y, float slope) {
  const Vector zero = {};
  const Vector r = at_least(e + (y < 0 ? y : zero), y > 0 ? -y : zero);
  return slope == 0 ? r : r + slope * (e - r);
}

// Calls `work` with (channel of the delta, channel of the base, coefficients): the perturbations of a channel in turn, so
// that its base values stay in cache.
template <class Work>
static void over_channels(const Chain& k, Index count, int threads, Work work) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (Index c = 0; c < k.channels; c++)
    for (Index p = 0; p < count; p++) {
      const Index at = p * k.channels + c;
      const Index base = k.start[p] + c;
      const float mean = k.mean ? k.mean[base] : 0;
      work(at, base, Coefficients{all(k.a ? k.a[at] : 1), all(k.c ? k.c[at] : 0), all(k.d ? k.d[at] : 0), all(mean)});
    }
}

template <bool CENTRED, bool RESIDUAL, bool RECTIFIED>
static void elementwise(const Chain& k, Index count, int threads) {
  const Index length = k.length * k.batch;
  over_channels(k, count, threads, [&](Index channel, Index base_channel, const Coefficients& with) {
    const Index from = channel * length, base = base_channel * length;
    over_run(length, [&](Index at) {
      Vector e = moved<CENTRED, RESIDUAL>(k, from + at, base + at, with);
      if constexpr (RECTIFIED) e = rectified(e, load(k.base + base + at), k.slope);
      store(k.out + from + at, e);
    });
  });
}

template <bool CENTRED, bool RESIDUAL, bool RECTIFIED>
static void pooled(const Chain& k, const Shape& s, Index count, int threads) {
  over_channels(k, count, threads, [&](Index channel, Index base_channel, const Coefficients& with) {
    for (Index oh = 0; oh < s.out_height; oh++) {
      const Taps v(oh, s.stride_h, s.pad_h, s.dilation_h, s.kernel_height, s.height);
      for (Index ow = 0; ow < s.out_width; ow++) {
        const Taps h(ow, s.stride_w, s.pad_w, s.dilation_w, s.kernel_width, s.width);
        const auto place = [&](Index kh, Index kw) {
          return ((oh * s.stride_h - s.pad_h + kh * s.dilation_h) * s.width + ow * s.stride_w - s.pad_w +
                  kw * s.dilation_w) * s.batch;
        };
        over_run(k.batch, [&](Index at) {
          const float* base = k.base + base_channel * k.length * k.batch + at;
          Vector most = load(base + place(v.first, h.first));
          for (Index kh = v.first; kh < v.last; kh++)
            for (Index kw = h.first; kw < h.last; kw++) most = larger(most, load(base + place(kh, kw)));
          Vector best = all(-__builtin_inff());
          for (Index kh = v.first; kh < v.last; kh++)
            for (Index kw = h.first; kw < h.last; kw++) {
              const Index at_tap = at + place(kh, kw);
              const Vector e = moved<CENTRED, RESIDUAL>(k, channel * k.length * k.batch + at_tap,
                                                        base_channel * k.length * k.batch + at_tap, with);
              best = larger(best, e + (load(base + place(kh, kw)) - most));
            }
          if constexpr (RECTIFIED) best = rectified(best, most, k.slope);
          store(k.out + ((channel * s.out_height + oh) * s.out_width + ow) * k.batch + at, best);
        });
      }
    }
  });
}

template <class Function>
static void with_flag(bool flag, Function function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

static void evaluate(const Chain& k, const Shape* pool, bool rectify, Index count, int threads) {
  with_flag(k.values, [&](auto centred) {
    with_flag(k.residual, [&](auto residual) {
      with_flag(rectify, [&](auto rectified) {
        if (pool)
          pooled<centred, residual, rectified>(k, *pool, count, threads);
        else
          elementwise<centred, residual, rectified>(k, count, threads);
      });
    });
  });
}

// out [P, channels, 2]: the means of delta and of (2*(values - mean) + delta)*delta over space and batch.
static void moments(const Chain& k, Index count, int threads) {
  const Index length = k.length * k.batch;
  constexpr Index RUN = 64 * LANES;  // summed in float32, the runs in double
  over_channels(k, count, threads, [&](Index channel, Index base_channel, const Coefficients& with) {
    const float *delta = k.delta + channel * length, *values = k.values + base_channel * length;
    double first = 0, second = 0;
    Index at = 0;
    while (at + LANES <= length) {
      Vector sum[2] = {}, squares[2] = {};
      const Index end = std::min(at + RUN, length);
      for (int turn = 0; at + LANES <= end; at += LANES, turn ^= 1) {
        const Vector d = load(delta + at);
        sum[turn] += d;
        squares[turn] += (2 * (load(values + at) - with.mean) + d) * d;
      }
      for (int lane = 0; lane < LANES; lane++) {
        first += double(sum[0][lane]) + sum[1][lane];
        second += double(squares[0][lane]) + squares[1][lane];
      }
    }
    for (; at < length; at++) {
      first += delta[at];
      second += (2 * (values[at] - with.mean[0]) + delta[at]) * delta[at];
    }
    k.out[2 * channel] = float(first / length);
    k.out[2 * channel + 1] = float(second / length);
  });
}
