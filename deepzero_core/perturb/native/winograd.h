// 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016): 36 products for 16 outputs.
//
//   V = B^T d B of every 6 x 6 patch d,   M[q] = U[q]^T V[q] at each of the 36 points q,   out = A^T M A
//
// The polynomials are taken at 0, +-3/4, +-3/2 and infinity, whose rounding is half that of the usual 0, +-1, +-2. It is
// relative to the values that are given: to differences, not to what they are differences of.
#pragma once
#include "convolution.h"

constexpr int TILE = 4, PATCH = 6, POINTS = PATCH * PATCH;
constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B, A3 = A * A2, B3 = B * B2;

alignas(64) static const float ZEROS[LANES] = {};

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

// One channel's patch as its values at the points, `step` apart. `seen`: where the patch lies, null outside the image.
static inline void transform(const float* const* seen, Index offset, float* v, Index step) {
  Vector columns[PATCH][PATCH];  // [column][point]
#pragma GCC unroll 6
  for (int c = 0; c < PATCH; c++) {
    Vector d[PATCH];
#pragma GCC unroll 6
    for (int r = 0; r < PATCH; r++) {
      const float* at = seen[r * PATCH + c];
      d[r] = load(at ? at + offset : ZEROS);
    }
    to_points(d, 1, columns[c]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < PATCH; r++) {
    Vector t[PATCH];
    to_points(&columns[0][r], PATCH, t);
#pragma GCC unroll 6
    for (int c = 0; c < PATCH; c++) store(v + (r * PATCH + c) * step, t[c]);
  }
}

// One output channel's tile from its values at the points, `step` apart.
static inline void transform_back(const Shape& s, const float* m, Index step, Index rows_left, Index columns_left,
                                  float* out) {
  Vector rows[TILE][PATCH];  // [row][point]
#pragma GCC unroll 6
  for (int c = 0; c < PATCH; c++) {
    Vector at[PATCH], y[TILE];
#pragma GCC unroll 6
    for (int r = 0; r < PATCH; r++) at[r] = load(m + (r * PATCH + c) * step);
    from_points(at, y);
#pragma GCC unroll 4
    for (int r = 0; r < TILE; r++) rows[r][c] = y[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < TILE; r++) {
    Vector y[TILE];
    from_points(rows[r], y);
    if (r < rows_left)
#pragma GCC unroll 4
      for (int c = 0; c < TILE; c++)
        if (c < columns_left) store(out + (r * s.out_width + c) * s.batch, y[c]);
  }
}

template <int N>
static void winograd_tile(const Shape& s, const float* x, const float* u, float* out, Index top, Index left, float* v,
                          float* m) {
  constexpr Index WIDTH = N * LANES;
  // A vector more than needed keeps the points of one channel from falling on the same cache lines.
  const Index v_step = s.channels * WIDTH + LANES, m_step = s.outputs * WIDTH + LANES;
  const Index plane = s.height * s.width * s.batch, out_plane = s.out_height * s.out_width * s.batch;
  const float* seen[POINTS];
  for (Index r = 0; r < PATCH; r++)
    for (Index c = 0; c < PATCH; c++) {
      const Index row = top - s.pad_h + r, column = left - s.pad_w + c;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      seen[r * PATCH + c] = inside ? x + (row * s.width + column) * s.batch : nullptr;
    }
  for (Index i = 0; i < s.channels; i++)
    for (int n = 0; n < N; n++)
      transform(seen, i * plane + n * LANES, v + i * WIDTH + n * LANES, v_step);
  for (Index q = 0; q < POINTS; q++)
    over_rows(s.outputs, [&](Index rows, Index o) {
      with_constant<ROWS>(rows, [&](auto r) {
        products<r, N>(v + q * v_step, u + q * s.channels * s.outputs + o, m + q * m_step + o * WIDTH,
                       s.channels, s.outputs);
      });
    });
  for (Index o = 0; o < s.outputs; o++)
    for (int n = 0; n < N; n++)
      transform_back(s, m + o * WIDTH + n * LANES, m_step, s.out_height - top, s.out_width - left,
                     out + o * out_plane + (top * s.out_width + left) * s.batch + n * LANES);
}

// x [P, C, H, W, B], u [36, C, O], out [P, O, OH, OW, B].
static void winograd(const Shape& s, const float* x, const float* u, Index count, float* out, int threads) {
  const Index rows = (s.out_height + TILE - 1) / TILE, columns = (s.out_width + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> v(POINTS * (s.channels * VECTORS + 1) * LANES), m(POINTS * (s.outputs * VECTORS + 1) * LANES);
#pragma omp for collapse(2) schedule(static)
    for (Index p = 0; p < count; p++)
      for (Index row = 0; row < rows; row++)
        for (Index column = 0; column < columns; column++)
          over_batch(s.batch, [&](Index vectors, Index at) {
            const float* from = x + p * s.channels * s.height * s.width * s.batch + at;
            float* to = out + p * s.outputs * s.out_height * s.out_width * s.batch + at;
            with_constant<VECTORS>(vectors, [&](auto n) {
              winograd_tile<n>(s, from, u, to, TILE * row, TILE * column, v.data(), m.data());
            });
          });
  }
}
