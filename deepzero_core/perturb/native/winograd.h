// 3 x 3 convolution of stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2016): 16 products for four outputs, not 36.
//
//   V = B^T d B of every 4 x 4 patch d,   M[q] = U[q]^T V[q] at each of the 16 points q,   out = A^T M A
//
// Its rounding is relative to the values it is given: to differences, not to what they are differences of.
#pragma once
#include "convolution.h"

// m [R, N] = U[:, r]^T v with v [channels, N] and U [channels, outputs]
template <int R, int N>
static void products(const float* v, const float* u, float* m, Index channels, Index outputs) {
  Vector sum[R][N] = {};
  for (Index i = 0; i < channels; i++) {
    Vector values[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) values[n] = load(v + (i * N + n) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[r][n] += u[i * outputs + r] * values[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(m + (r * N + n) * LANES, sum[r][n]);
}

static inline void patch(const Shape& s, const float* x, Index top, Index left, Vector v[16]) {
  Vector d[4][4], t[4][4];
  for (int r = 0; r < 4; r++)
    for (int c = 0; c < 4; c++) {
      const Index row = top - s.pad_h + r, column = left - s.pad_w + c;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      d[r][c] = inside ? load(x + (row * s.width + column) * s.batch) : Vector{};
    }
  for (int c = 0; c < 4; c++) {
    t[0][c] = d[0][c] - d[2][c];
    t[1][c] = d[1][c] + d[2][c];
    t[2][c] = d[2][c] - d[1][c];
    t[3][c] = d[1][c] - d[3][c];
  }
  for (int r = 0; r < 4; r++) {
    v[4 * r] = t[r][0] - t[r][2];
    v[4 * r + 1] = t[r][1] + t[r][2];
    v[4 * r + 2] = t[r][2] - t[r][1];
    v[4 * r + 3] = t[r][1] - t[r][3];
  }
}

static inline void outputs_of(const Shape& s, const float* m, Index step, Index top, Index left, float* out) {
  Vector t[2][4];
  for (int c = 0; c < 4; c++) {
    const Vector a = load(m + c * step), b = load(m + (4 + c) * step), d = load(m + (8 + c) * step);
    t[0][c] = a + b + d;
    t[1][c] = b - d - load(m + (12 + c) * step);
  }
  for (int r = 0; r < 2 && top + r < s.out_height; r++) {
    float* to = out + ((top + r) * s.out_width + left) * s.batch;
    store(to, t[r][0] + t[r][1] + t[r][2]);
    if (left + 1 < s.out_width) store(to + s.batch, t[r][1] - t[r][2] - t[r][3]);
  }
}

template <int N>
static void winograd_tile(const Shape& s, const float* x, const float* u, float* out, Index top, Index left, float* v,
                          float* m) {
  const Index plane = s.height * s.width * s.batch, out_plane = s.out_height * s.out_width * s.batch;
  for (Index i = 0; i < s.channels; i++)
    for (int n = 0; n < N; n++) {
      Vector transformed[16];
      patch(s, x + i * plane + n * LANES, top, left, transformed);
      for (int q = 0; q < 16; q++) store(v + ((q * s.channels + i) * N + n) * LANES, transformed[q]);
    }
  for (Index q = 0; q < 16; q++)
    over_rows(s.outputs, [&](Index rows, Index o) {
      with_constant<ROWS>(rows, [&](auto r) {
        products<r, N>(v + q * s.channels * N * LANES, u + q * s.channels * s.outputs + o,
                       m + (q * s.outputs + o) * N * LANES, s.channels, s.outputs);
      });
    });
  for (Index o = 0; o < s.outputs; o++)
    for (int n = 0; n < N; n++)
      outputs_of(s, m + (o * N + n) * LANES, s.outputs * N * LANES, top, left, out + o * out_plane + n * LANES);
}

// x [P, C, H, W, B], u [16, C, O], out [P, O, OH, OW, B].
static void winograd(const Shape& s, const float* x, const float* u, Index count, float* out, int threads) {
  const Index rows = (s.out_height + 1) / 2, columns = (s.out_width + 1) / 2;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> v(16 * s.channels * VECTORS * LANES), m(16 * s.outputs * VECTORS * LANES);
#pragma omp for collapse(2) schedule(static)
    for (Index p = 0; p < count; p++)
      for (Index row = 0; row < rows; row++)
        for (Index column = 0; column < columns; column++)
          over_batch(s.batch, [&](Index vectors, Index at) {
            const float* from = x + p * s.channels * s.height * s.width * s.batch + at;
            float* to = out + p * s.outputs * s.out_height * s.out_width * s.batch + at;
            with_constant<VECTORS>(vectors, [&](auto n) {
              winograd_tile<n>(s, from, u, to, 2 * row, 2 * column, v.data(), m.data());
            });
          });
  }
}
