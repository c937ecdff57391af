// Sums of products of matrices that lie in the caches, row by row.
#pragma once
#include <vector>

#include "vectors.h"

static inline Index padded(Index length) { return (length + LANES - 1) / LANES * LANES; }

struct View {  // a matrix whose rows are filled up with zeros to whole vectors
  const float* values;
  Index rows, columns, width;
  const float* row(Index r) const { return values + r * width; }
};

struct Matrix {
  Index rows, columns, width;
  std::vector<Vector> values;  // of vectors, so that none lies across two cache lines

  Matrix(Index r, Index c) : rows(r), columns(c), width(padded(c)), values(r * width / LANES) {}
  float* row(Index r) { return reinterpret_cast<float*>(values.data()) + r * width; }
  View view() const { return {reinterpret_cast<const float*>(values.data()), rows, columns, width}; }
  void copy(const float* from, Index row_stride, Index column_stride, float factor) {
    for (Index r = 0; r < rows; r++)
      for (Index c = 0; c < columns; c++) row(r)[c] = factor * from[r * row_stride + c * column_stride];
  }
  bool moves() const {
    Vector most = {};
    for (const Vector& v : values) most += v < 0 ? -v : v;
    for (int lane = 0; lane < LANES; lane++)
      if (most[lane] != 0) return true;
    return false;
  }
  void add(const Matrix& one, const Matrix& other) {
    for (size_t i = 0; i < values.size(); i++) values[i] = one.values[i] + other.values[i];
  }
};

struct Product {
  View left, right;
};

// out [rows, width], from row `first` and column `at` on: the sum of the products.
template <int R, int N>
static inline void sum_tile(const Product* products, int count, Index first, Index at, Matrix& out) {
  Vector sum[R][N] = {};
  for (const Product* p = products; p < products + count; p++) {
    const float* factors = p->left.row(first);
    for (Index k = 0; k < p->left.columns; k++) {
      const float* from = p->right.row(k) + at;
      Vector values[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) values[n] = load(from + n * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sum[r][n] += factors[r * p->left.width + k] * values[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(out.row(first + r) + at + n * LANES, sum[r][n]);
}

static void sum_of(const Product* products, int count, Matrix& out) {
  over_blocks<VECTORS>(out.width / LANES, [&](Index vectors, Index v) {
    over_blocks<ROWS>(out.rows, [&](Index rows, Index r) {
      with_constant<1, ROWS>(rows, [&](auto R) {
        with_constant<1, VECTORS>(vectors, [&](auto N) { sum_tile<R, N>(products, count, r, v * LANES, out); });
      });
    });
  });
}
