// 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016): 36 products for 16 outputs, not 144.
//
//   V = B^T d B of every 6 x 6 patch d,   M[q] = U[q]^T V[q] at each of the 36 points q,   out = A^T M A
//
// The polynomials are taken at 0, +-3/4, +-3/2 and infinity, whose rounding is half that of the usual 0, +-1, +-2. It is
// relative to the values that are given: to differences, not to what they are differences of.
#pragma once
#include "convolution.h"

constexpr int TILE = 4, PATCH = 6, POINTS = PATCH * PATCH;
constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B, A3 = A * A2, B3 = B * B2;

// B^T of six values `step` apart
static inline void to_points(const Vector* d, int step, Vector* t) {
  const Vector even_a = d[4 * step] - B2 * d[2 * step], odd_a = A * (d[3 * step] - B2 * d[step]);
  const Vector even_b = d[4 * step] - A2 * d[2 * step], odd_b = B * (d[3 * step] - A2 * d[step]);
  t[0] = A2 * B2 * d[0] - (A2 + B2) * d[2 * step] + d[4 * step];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = A2 * B2 * d[step] - (A2 + B2) * d[3 * step] + d[5 * step];
}

// A^T of six values
static inline void from_points(const Vector* m, Vector* y) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = A * odd_a + B * odd_b;
  y[2] = A2 * even_a + B2 * even_b;
  y[3] = A3 * odd_a + B3 * odd_b + m[5];
}

// m [R, N] = U[:, r]^T v with v [channels, N] and U [channels, outputs]
template <int R, int N>
static void products(const float* v, const float* u, float* m, Index channels, Index outputs) {
  Vector sum[R][N] = {};
  for (Index i = 0; i < channels; i++) {
    Vector values[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) values[n] = load(v + (i * N + n) * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 12
      for (int n = 0; n < N; n++) sum[r][n] += u[i * outputs + r] * values[n];
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) store(m + (r * N + n) * LANES, sum[r][n]);
}

// One channel's patch as its values at the points, `step` apart.
static inline void transform(const Shape& s, const float* x, Index top, Index left, float* v, Index step) {
  Vector columns[PATCH][PATCH];  // [column][point]
  for (int c = 0; c < PATCH; c++) {
    Vector d[PATCH];
    const Index column = left - s.pad_w + c;
    for (int r = 0; r < PATCH; r++) {
      const Index row = top - s.pad_h + r;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      d[r] = inside ? load(x + (row * s.width + column) * s.batch) : Vector{};
    }
    to_points(d, 1, columns[c]);
  }
  for (int r = 0; r < PATCH; r++) {
    Vector t[PATCH];
    to_points(&columns[0][r], PATCH, t);
    for (int c = 0; c < PATCH; c++) store(v + (r * PATCH + c) * step, t[c]);
  }
}

// One output channel's tile from its values at the points, `step` apart.
static inline void transform_back(const Shape& s, const float* m, Index step, Index top, Index left, float* out) {
  Vector rows[TILE][PATCH];  // [row][point]
  for (int c = 0; c < PATCH; c++) {
    Vector at[PATCH], y[TILE];
    for (int r = 0; r < PATCH; r++) at[r] = load(m + (r * PATCH + c) * step);
    from_points(at, y);
    for (int r = 0; r < TILE; r++) rows[r][c] = y[r];
  }
  for (int r = 0; r < TILE && top + r < s.out_height; r++) {
    Vector y[TILE];
    from_points(rows[r], y);
    for (int c = 0; c < TILE && left + c < s.out_width; c++)
      store(out + ((top + r) * s.out_width + left + c) * s.batch, y[c]);
  }
}

template <int N>
static void winograd_tile(const Shape& s, const float* x, const float* u, float* out, Index top, Index left, float* v,
                          float* m) {
  constexpr Index WIDTH = N * LANES;
  const Index plane = s.height * s.width * s.batch, out_plane = s.out_height * s.out_width * s.batch;
  for (Index i = 0; i < s.channels; i++)
    for (int n = 0; n < N; n++)
      transform(s, x + i * plane + n * LANES, top, left, v + i * WIDTH + n * LANES, s.channels * WIDTH);
  for (Index q = 0; q < POINTS; q++)
    over_rows<TALL>(s.outputs, [&](Index rows, Index o) {
      with_constant<TALL>(rows, [&](auto r) {
        products<r, N>(v + q * s.channels * WIDTH, u + q * s.channels * s.outputs + o, m + (q * s.outputs + o) * WIDTH,
                       s.channels, s.outputs);
      });
    });
  for (Index o = 0; o < s.outputs; o++)
    for (int n = 0; n < N; n++)
      transform_back(s, m + o * WIDTH + n * LANES, s.outputs * WIDTH, top, left, out + o * out_plane + n * LANES);
}

// x [P, C, H, W, B], u [36, C, O], out [P, O, OH, OW, B].
static void winograd(const Shape& s, const float* x, const float* u, Index count, float* out, int threads) {
  const Index rows = (s.out_height + TILE - 1) / TILE, columns = (s.out_width + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> v(POINTS * s.channels * WIDE * LANES), m(POINTS * s.outputs * WIDE * LANES);
#pragma omp for collapse(2) schedule(static)
    for (Index p = 0; p < count; p++)
      for (Index row = 0; row < rows; row++)
        for (Index column = 0; column < columns; column++)
          over_batch<WIDE>(s.batch, [&](Index vectors, Index at) {
            const float* from = x + p * s.channels * s.height * s.width * s.batch + at;
            float* to = out + p * s.outputs * s.out_height * s.out_width * s.batch + at;
            with_constant<WIDE>(vectors, [&](auto n) {
              winograd_tile<n>(s, from, u, to, TILE * row, TILE * column, v.data(), m.data());
            });
          });
  }
}
