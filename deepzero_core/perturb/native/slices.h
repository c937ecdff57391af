// A slice is LANES examples of one perturbation's change, [channels, height, width, LANES]: whatever the channels and
// windows, an operator is the same arithmetic on whole vectors of examples. Every operator here takes one slice. The
// last slice of a batch is filled up with zeros; only sums over the batch have to know.
#pragma once
#include "vectors.h"

struct Shape {
  Index channels, outputs, height, width, out_height, out_width, kernel_height, kernel_width;
  Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  Index length() const { return height * width * LANES; }
  Index out_length() const { return out_height * out_width * LANES; }
};

struct Taps {  // of one output row or column: those that meet the input
  Index first, last;
  Taps(Index at, Index stride, Index pad, Index dilation, Index kernel, Index length) : first(0), last(kernel) {
    while (first < kernel && at * stride - pad + first * dilation < 0) first++;
    while (last > first && at * stride - pad + (last - 1) * dilation >= length) last--;
  }
};

alignas(64) static const float ZEROS[LANES] = {};

// ---- The perturbed parameter's own operator: the change of one channel, [height, width, LANES].

struct Moved {  // which element of the parameter moves: its channel and, of a convolution's weight, input channel and tap
  Index channel, input, row, column;
};

// W[o, i, kh, kw] moves by `step`: step * (input channel i, shifted).
static void weight_moved(const Shape& s, const float* x, const Moved& at, float step, float* out) {
  const float* plane = x + at.input * s.length();
  for (Index h = 0; h < s.out_height; h++) {
    const Index row = h * s.stride_h - s.pad_h + at.row * s.dilation_h;
    const bool row_inside = row >= 0 && row < s.height;
    for (Index w = 0; w < s.out_width; w++) {
      const Index column = w * s.stride_w - s.pad_w + at.column * s.dilation_w;
      const bool inside = row_inside && column >= 0 && column < s.width;
      store(out, step * load(inside ? plane + (row * s.width + column) * LANES : ZEROS));
      out += LANES;
    }
  }
}

// A channel's weight (or, without values, its bias) moves by `step`: step * scale * (values - mean).
static void affine_moved(const float* values, float mean, float scale, float step, Index length, float* out) {
  for (Index at = 0; at < length; at += LANES)
    store(out + at, values ? step * scale * (load(values + at) - mean) : all(step));
}

// ---- What is the same for every channel.

// Sums of delta and of (2*(values - mean) + delta)*delta over space and the first `examples` lanes.
static void moments(const float* delta, const float* values, float mean, Index length, Index examples, double* sums) {
  constexpr Index RUN = 64 * LANES;  // summed in float32, the runs in double
  constexpr int CHAINS = 4;          // additions that need not wait for each other
  double first = 0, second = 0;
  for (Index from = 0; from < length; from += RUN) {
    Vector sum[CHAINS] = {}, squares[CHAINS] = {};
    const auto add = [&](Index at, int k) {
      const Vector d = load(delta + at);
      sum[k] += d;
      squares[k] += (2 * (load(values + at) - mean) + d) * d;
    };
    const Index end = std::min(from + RUN, length);
    Index at = from;
    for (; at + CHAINS * LANES <= end; at += CHAINS * LANES)
#pragma GCC unroll 4
      for (int k = 0; k < CHAINS; k++) add(at + k * LANES, k);
    for (; at < end; at += LANES) add(at, 0);
    for (Index lane = 0; lane < examples; lane++)
#pragma GCC unroll 4
      for (int k = 0; k < CHAINS; k++) {
        first += sum[k][lane];
        second += squares[k][lane];
      }
  }
  sums[0] = first;
  sums[1] = second;
}

static void mean_over_space(const float* delta, Index length, float* out) {
  Vector sum = {};
  for (Index at = 0; at < length; at += LANES) sum += load(delta + at);
  store(out, sum / float(length / LANES));
}

// out[h, w] = delta[h*stride + first row, w*stride + first column], 0 outside: slices and padding. `s.pad_*` is minus
// the first row and column.
static void placed(const Shape& s, const float* delta, float* out) {
  for (Index h = 0; h < s.out_height; h++) {
    const Index row = h * s.stride_h - s.pad_h;
    for (Index w = 0; w < s.out_width; w++) {
      const Index column = w * s.stride_w - s.pad_w;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      store(out, load(inside ? delta + (row * s.width + column) * LANES : ZEROS));
      out += LANES;
    }
  }
}
