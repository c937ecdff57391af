// out[o, h, w] = sum over i, kh, kw of W[i, kh, kw, o] * x[i, h*s - p + kh*d, w*s - p + kw*d], group by group; and the
// mean over a window.
#pragma once
#include "slices.h"

template <int R, int N>
static void direct_tile(const Shape& s, const float* x, const float* weight, const Index* const* seen, float* out) {
  const Index taps = s.kernel_height * s.kernel_width;
  Vector sum[R][N] = {};
  for (Index i = 0; i < s.channels; i++)
    for (Index tap = 0; tap < taps; tap++) {
      const float* from = weight + (i * taps + tap) * s.outputs;
      Vector values[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const Index place = seen[n][tap];
        values[n] = load(place < 0 ? ZEROS : x + i * s.length() + place);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sum[r][n] += from[r] * values[n];
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(out + r * s.out_length() + n * LANES, sum[r][n]);
}

// Of every group: x [channels, H, W, LANES], weight [channels, KH, KW, O], out [O, OH, OW, LANES], one group after the
// other. places: [VECTORS, taps] scratch.
static void convolve(const Shape& s, Index groups, const float* x, const float* weight, float* out, Index* places) {
  const Index taps = s.kernel_height * s.kernel_width;
  const Index* seen[VECTORS];
  for (int n = 0; n < VECTORS; n++) seen[n] = places + n * taps;
  const Index positions = s.out_height * s.out_width;
  for (Index first = 0; first < positions; first += VECTORS) {
    const Index count = std::min<Index>(VECTORS, positions - first);
    for (Index n = 0; n < count; n++) {
      const Index oh = (first + n) / s.out_width, ow = (first + n) % s.out_width;
      Index* to = places + n * taps;
      for (Index kh = 0; kh < s.kernel_height; kh++)
        for (Index kw = 0; kw < s.kernel_width; kw++) {
          const Index row = oh * s.stride_h - s.pad_h + kh * s.dilation_h;
          const Index column = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
          const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
          *to++ = inside ? (row * s.width + column) * LANES : -1;
        }
    }
    for (Index g = 0; g < groups; g++) {
      const float *from = x + g * s.channels * s.length(), *with = weight + g * s.channels * taps * s.outputs;
      float* to = out + g * s.outputs * s.out_length() + first * LANES;
      over_blocks<ROWS>(s.outputs, [&](Index rows, Index o) {
        with_constant<1, ROWS>(rows, [&](auto r) {
          with_constant<1, VECTORS>(count, [&](auto n) {
            direct_tile<r, n>(s, from, with + o, seen, to + o * s.out_length());
          });
        });
      });
    }
  }
}

// One channel: the sum over every window divided by the size of the whole window, padding included.
static void averaged(const Shape& s, const float* x, float* out) {
  const float share = 1 / float(s.kernel_height * s.kernel_width);
  for (Index oh = 0; oh < s.out_height; oh++) {
    const Taps v(oh, s.stride_h, s.pad_h, s.dilation_h, s.kernel_height, s.height);
    for (Index ow = 0; ow < s.out_width; ow++) {
      const Taps h(ow, s.stride_w, s.pad_w, s.dilation_w, s.kernel_width, s.width);
      Vector sum = {};
      for (Index kh = v.first; kh < v.last; kh++)
        for (Index kw = h.first; kw < h.last; kw++) {
          const Index row = oh * s.stride_h - s.pad_h + kh * s.dilation_h;
          const Index column = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
          sum += load(x + (row * s.width + column) * LANES);
        }
      store(out, share * sum);
      out += LANES;
    }
  }
}
