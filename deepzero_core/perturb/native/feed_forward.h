// The change of W2 f(W1 x), a few rows at a time while they are in the caches; see rules/feed_forward.py.
//
//   h = W1 delta,   g = h (c[0] + c[1] h + ...),   out = W2 g
#pragma once
#include "products.h"

struct FeedForward {
  Index count, rows, inputs, hidden, outputs, terms;
  const float* delta;                // [count, rows, inputs]
  const float *first, *second;       // [inputs, hidden] and [hidden, outputs], rows in whole vectors
  const float* const* coefficients;  // [terms] of [rows, hidden]
  double radius;                     // up to which |h| they hold
  float* out;                        // [count, rows, outputs]
};

// False where some |h| exceeds the radius or is NaN.
template <int TERMS>
static bool activate(const FeedForward& call, Index first, Matrix& h) {
  Vector most = {};
  for (Index r = 0; r < h.rows; r++) {
    const Index place = (first + r) * call.hidden;
    float* values = h.row(r);
    for (Index at = 0; at < h.width; at += LANES) {
      const Vector size = load(values + at);
      most = larger(most, size < 0 ? -size : size);
    }
#pragma omp simd
    for (Index i = 0; i < call.hidden; i++) {
      float sum = call.coefficients[TERMS - 1][place + i];
#pragma GCC unroll 16
      for (int term = TERMS - 2; term >= 0; term--) sum = call.coefficients[term][place + i] + sum * values[i];
      values[i] *= sum;
    }
  }
  for (int lane = 0; lane < LANES; lane++)
    if (!(most[lane] <= call.radius)) return false;
  return true;
}

static bool feed_forward(const FeedForward& call, int threads) {
  constexpr Index TILE_ROWS = 4 * ROWS;
  bool small = true;
#pragma omp parallel num_threads(threads) reduction(&& : small)
  {
    Matrix h(TILE_ROWS, call.hidden), out(TILE_ROWS, call.outputs);
    const View first{call.first, call.inputs, call.hidden, h.width};
    const View second{call.second, call.hidden, call.outputs, out.width};
#pragma omp for schedule(static)
    for (Index row = 0; row < call.rows; row += TILE_ROWS)
      for (Index k = 0; k < call.count && small; k++) {
        h.rows = out.rows = std::min(TILE_ROWS, call.rows - row);
        const Index place = k * call.rows + row;
        const Product into{{call.delta + place * call.inputs, h.rows, call.inputs, call.inputs}, first};
        sum_of(&into, 1, h);
        with_constant<2, 12>(call.terms, [&](auto terms) { small = activate<terms>(call, row, h); });
        const Product out_of{h.view(), second};
        sum_of(&out_of, 1, out);
        for (Index r = 0; r < out.rows; r++)
          std::copy(out.row(r), out.row(r) + call.outputs, call.out + (place + r) * call.outputs);
      }
  }
  return small;
}
