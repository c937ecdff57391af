// out[o, h, w, :] = sum over i, kh, kw of W[i, kh, kw, o] * x[i, h*s - p + kh*d, w*s - p + kw*d, :]
#pragma once
#include "vectors.h"

struct Shape {
  Index channels, outputs, height, width, out_height, out_width, kernel_height, kernel_width;
  Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, batch;
};

struct Taps {  // of one output row or column: those that meet the input
  Index first, last;
  Taps(Index at, Index stride, Index pad, Index dilation, Index kernel, Index length) : first(0), last(kernel) {
    while (first < kernel && at * stride - pad + first * dilation < 0) first++;
    while (last > first && at * stride - pad + (last - 1) * dilation >= length) last--;
  }
};

template <class Element, int R, int N>
static void tile(const Shape& s, const float* x, const float* weight, float* out, Index oh, Index ow, Taps v, Taps h) {
  Vector sum[R][N] = {};
  for (Index i = 0; i < s.channels; i++)
    for (Index kh = v.first; kh < v.last; kh++)
      for (Index kw = h.first; kw < h.last; kw++) {
        const Index row = oh * s.stride_h - s.pad_h + kh * s.dilation_h;
        const Index column = ow * s.stride_w - s.pad_w + kw * s.dilation_w;
        const float* seen = x + ((i * s.height + row) * s.width + column) * s.batch;
        const float* tap = weight + ((i * s.kernel_height + kh) * s.kernel_width + kw) * s.outputs;
        Vector values[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) values[n] = load(seen + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) sum[r][n] = Element::add(sum[r][n], tap[r], values[n]);
      }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(out + r * s.out_height * s.out_width * s.batch + n * LANES, sum[r][n]);
}

// x [P, channels, H, W, B], weight [all channels, KH, KW, O] read from channel start[p], out [P, O, OH, OW, B].
template <class Element>
static void convolve(const Shape& s, const float* x, const float* weight, const Index* start, Index count, float* out,
                     int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (Index p = 0; p < count; p++)
    for (Index oh = 0; oh < s.out_height; oh++) {
      const Taps v(oh, s.stride_h, s.pad_h, s.dilation_h, s.kernel_height, s.height);
      const float* from = x + p * s.channels * s.height * s.width * s.batch;
      const float* taps = weight + start[p] * s.kernel_height * s.kernel_width * s.outputs;
      for (Index ow = 0; ow < s.out_width; ow++) {
        const Taps h(ow, s.stride_w, s.pad_w, s.dilation_w, s.kernel_width, s.width);
        over_batch(s.batch, [&](Index vectors, Index at) {
          over_rows(s.outputs, [&](Index rows, Index o) {
            float* to = out + (((p * s.outputs + o) * s.out_height + oh) * s.out_width + ow) * s.batch + at;
            with_constant<ROWS>(rows, [&](auto r) {
              with_constant<VECTORS>(
                  vectors, [&](auto n) { tile<Element, r, n>(s, from + at, taps + o, to, oh, ow, v, h); });
            });
          });
        });
      }
    }
}

// [P, C, L] -> [P, ceil(C / 2), L] of pairs of bfloat16, a missing channel 0.
static void pair_channels(const float* x, Index count, Index channels, Index length, float* out, int threads) {
  const Index pairs = (channels + 1) / 2;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (Index p = 0; p < count; p++)
    for (Index pair = 0; pair < pairs; pair++) {
      const float* low = x + (p * channels + 2 * pair) * length;
      const float* high = 2 * pair + 1 < channels ? low + length : nullptr;
      float* to = out + (p * pairs + pair) * length;
      over_run(length, [&](Index at) {
        store(to + at, BFloat16::pack(load(low + at), high ? load(high + at) : Vector{}));
      });
    }
}
