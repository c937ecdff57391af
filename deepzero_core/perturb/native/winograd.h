// 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016): 36 products for 16 outputs.
//
//   V = B^T d B of every patch d,   M[q] = U[q]^T V[q] at each of the points q,   out = A^T M A
//
// Rounding is relative to the values that are given: to differences, not to what they are differences of. Rounding U and
// V independently by a relative e gives the result an error of e times (sum_p |A_p|^2 |B_p|^2 |G_p|^2)/3m that of direct
// products, all rows at the point p. The polynomials are taken at points where this factor is small: 5.1, where the usual
// points 0, +-1, +-2 have 10.8.
#pragma once
#include "slices.h"

constexpr int TILE = 4, PATCH = 6, POINTS = PATCH * PATCH, HALF = PATCH / 2;
constexpr float A = 0.75f, B = 1.5f, A2 = A * A, B2 = B * B, A3 = A * A2, B3 = B * B2;

// Half of B^T of six values: the values at the points 0, +-A, or at +-B and infinity. A whole patch at all six points
// would not fit in the registers.
template <bool OUTER>
static inline void to_points(const Vector* d, Vector* t) {
  if constexpr (!OUTER) {
    const Vector even = d[4] - B2 * d[2], odd = d[3] - B2 * d[1];
    t[0] = A2 * B2 * d[0] - (A2 + B2) * d[2] + d[4];
    t[1] = even + A * odd;
    t[2] = even - A * odd;
  } else {
    const Vector even = d[4] - A2 * d[2], odd = d[3] - A2 * d[1];
    t[0] = even + B * odd;
    t[1] = even - B * odd;
    t[2] = A2 * B2 * d[1] - (A2 + B2) * d[3] + d[5];
  }
}

// A^T of six values
static inline void from_points(const Vector* m, Vector* y) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = A * odd_a + B * odd_b;
  y[2] = A2 * even_a + B2 * even_b;
  y[3] = A3 * odd_a + B3 * odd_b + m[5];
}

// m [R, N] = U[:, r]^T v with v [channels, N] and U [channels, outputs]; a channel of bfloat16 is a pair of them
template <class Element, int R, int N>
static inline void products(const float* v, const float* u, float* m, Index channels, Index outputs) {
  Vector sum[R][N] = {};
  for (Index i = 0; i < channels; i++) {
    Vector values[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) values[n] = load(v + (i * N + n) * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 12
      for (int n = 0; n < N; n++) sum[r][n] = Element::add(sum[r][n], u[i * outputs + r], values[n]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) store(m + (r * N + n) * LANES, sum[r][n]);
}

// One half of the rows of one channel's patch at the points, `step` apart. `patch`: where each of its elements lies.
template <bool OUTER, class Store>
static inline void transform_half(const float* const* patch, Index step, float* v, Store put) {
  constexpr int FIRST = OUTER ? HALF : 0;
  Vector rows[HALF][PATCH];
#pragma GCC unroll 6
  for (int c = 0; c < PATCH; c++) {
    Vector d[PATCH], t[HALF];
#pragma GCC unroll 6
    for (int r = 0; r < PATCH; r++) d[r] = load(patch[r * PATCH + c]);
    to_points<OUTER>(d, t);
#pragma GCC unroll 3
    for (int r = 0; r < HALF; r++) rows[r][c] = t[r];
  }
#pragma GCC unroll 3
  for (int r = 0; r < HALF; r++) {
    Vector t[PATCH];
    to_points<false>(rows[r], t);
    to_points<true>(rows[r], t + HALF);
#pragma GCC unroll 6
    for (int c = 0; c < PATCH; c++) put(v + ((FIRST + r) * PATCH + c) * step, t[c]);
  }
}

template <class Store>
static inline void transform(const float* const* patch, Index step, float* v, Store put) {
  transform_half<false>(patch, step, v, put);
  transform_half<true>(patch, step, v, put);
}

// One output channel's tile from its values at the points, `step` apart.
static inline void transform_back(const float* m, Index step, Index width, Index rows_left, Index columns_left,
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
        if (c < columns_left) store(out + (r * width + c) * LANES, y[c]);
  }
}

// Floats of scratch that `winograd` needs.
static Index winograd_scratch(const Shape& s) {
  return POINTS * ((s.channels + s.outputs) * VECTORS + 2) * LANES;
}

// N tiles, numbers first … first + N - 1 in the order of rows.
template <class Element, int N>
static void winograd_tiles(const Shape& s, const float* x, const float* u, float* out, Index first, float* scratch) {
  constexpr Index WIDTH = N * LANES;
  const Index columns = (s.out_width + TILE - 1) / TILE, inner = s.channels / Element::CHANNELS;
  // A vector more than needed keeps the points of one channel from falling on the same cache lines.
  const Index v_step = inner * WIDTH + LANES, m_step = s.outputs * WIDTH + LANES;
  float *v = scratch, *m = scratch + POINTS * v_step;
  const float* patch[N][POINTS];
  Index strides[N][POINTS];  // to the same element of the next channel
  for (int n = 0; n < N; n++) {
    const Index top = (first + n) / columns * TILE - s.pad_h, left = (first + n) % columns * TILE - s.pad_w;
    for (Index k = 0; k < POINTS; k++) {
      const Index row = top + k / PATCH, column = left + k % PATCH;
      const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      patch[n][k] = inside ? x + (row * s.width + column) * LANES : ZEROS;
      strides[n][k] = inside ? s.length() : 0;
    }
  }
  for (Index word = 0; word < inner; word++)
    for (int n = 0; n < N; n++) {
      const auto next_channel = [&](auto put) {
        transform(patch[n], v_step, v + word * WIDTH + n * LANES, put);
        for (Index k = 0; k < POINTS; k++) patch[n][k] += strides[n][k];
      };
      next_channel(store);
      if constexpr (Element::CHANNELS == 2)
        next_channel([](float* at, Vector high) { store(at, Element::pack(load(at), high)); });
    }
  for (Index q = 0; q < POINTS; q++)
    over_blocks<ROWS>(s.outputs, [&](Index rows, Index o) {
      with_constant<1, ROWS>(rows, [&](auto r) {
        products<Element, r, N>(v + q * v_step, u + q * inner * s.outputs + o, m + q * m_step + o * WIDTH, inner,
                                s.outputs);
      });
    });
  for (Index o = 0; o < s.outputs; o++)
    for (int n = 0; n < N; n++) {
      const Index top = (first + n) / columns * TILE, left = (first + n) % columns * TILE;
      transform_back(m + o * WIDTH + n * LANES, m_step, s.out_width, s.out_height - top, s.out_width - left,
                     out + o * s.out_length() + (top * s.out_width + left) * LANES);
    }
}

// x [C, H, W, LANES], u [36, C, O] or, of pairs of bfloat16, [36, C/2, O], out [O, OH, OW, LANES].
template <class Element>
static void winograd(const Shape& s, const float* x, const float* u, float* out, float* scratch) {
  const Index tiles = ((s.out_height + TILE - 1) / TILE) * ((s.out_width + TILE - 1) / TILE);
  for (Index first = 0; first < tiles; first += VECTORS)
    with_constant<1, VECTORS>(std::min<Index>(VECTORS, tiles - first),
                             [&](auto n) { winograd_tiles<Element, n>(s, x, u, out, first, scratch); });
}
