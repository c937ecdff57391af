// The change of softmax(a b) v, head by head while it is in the caches; see rules/attention.py.
//
//   D = da b + (a + da) db,   e = p expm1(D),   S = sum e,   dp = (e - p S)/(1 + S),   out = dp v + (p + dp) dv
#pragma once
#include <cmath>
#include <vector>

#include "vectors.h"

struct Operand {  // of one factor: base [batch, heads, rows, columns] and change [count, ...]; null: it does not move
  const float *base, *change;
  Index strides[4], moved[5];
};

struct Attention {
  Index count, batch, heads, rows, inner, keys, features;
  Operand a, b, v;      // [rows, inner], [inner, keys], [keys, features]
  const float* shares;  // p [batch, heads, rows, keys]
  float* out;           // [count, batch, rows, heads, features]
  double scale;         // of a b
};

static inline Index padded(Index length) { return (length + LANES - 1) / LANES * LANES; }

struct Matrix {  // rows filled up with zeros to whole vectors
  Index rows, columns, width;
  std::vector<float> values;

  Matrix(Index r, Index c) : rows(r), columns(c), width(padded(c)), values(r * width) {}
  float* row(Index r) { return values.data() + r * width; }
  const float* row(Index r) const { return values.data() + r * width; }
  void copy(const float* from, Index row_stride, Index column_stride, float factor) {
    for (Index r = 0; r < rows; r++)
      for (Index c = 0; c < columns; c++) row(r)[c] = factor * from[r * row_stride + c * column_stride];
  }
  void add(const Matrix& one, const Matrix& other) {
    for (size_t i = 0; i < values.size(); i++) values[i] = one.values[i] + other.values[i];
  }
};

// out [rows, width] = x y + x' y', from row `first` of x on; null: there is no such product.
template <int R, int N>
static inline void two_products(const Matrix* x, const Matrix* y, const Matrix* x2, const Matrix* y2, Index first,
                                Index at, Matrix& out) {
  Vector sum[R][N] = {};
  const auto add = [&](const Matrix& left, const Matrix& right) {
    const float* factors = left.row(first);
    for (Index k = 0; k < left.columns; k++) {
      const float* from = right.row(k) + at;
      Vector values[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) values[n] = load(from + n * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sum[r][n] += factors[r * left.width + k] * values[n];
    }
  };
  if (x) add(*x, *y);
  if (x2) add(*x2, *y2);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(out.row(first + r) + at + n * LANES, sum[r][n]);
}

static void sum_of_products(const Matrix* x, const Matrix* y, const Matrix* x2, const Matrix* y2, Matrix& out) {
  over_blocks<VECTORS>(out.width / LANES, [&](Index vectors, Index v) {
    over_blocks<ROWS>(out.rows, [&](Index rows, Index r) {
      with_constant<1, ROWS>(rows, [&](auto R) {
        with_constant<1, VECTORS>(vectors, [&](auto N) { two_products<R, N>(x, y, x2, y2, r, v * LANES, out); });
      });
    });
  });
}

// expm1(x) to 3e-8 of itself for |x| <= 1: its series.
static inline Vector small_expm1(Vector x) {
  Vector sum = all(1 / 11.0f);
#pragma GCC unroll 16
  for (int k = 10; k > 1; k--) sum = (1 + sum * x) * (1.0f / k);
  return (1 + sum * x) * x;
}

// dp and p + dp of one row from D, in place of it. False where some |D| > 1 or is NaN.
static bool normalise_row(const float* p, float* change, float* moved, Index width) {
  Vector sum = {}, most = {};
  for (Index at = 0; at < width; at += LANES) {
    const Vector d = load(change + at), size = d < 0 ? -d : d;
    most = larger(most, size);
    const Vector e = load(p + at) * small_expm1(d);
    sum += e;
    store(change + at, e);
  }
  float total = 0;
  bool small = true;
  for (Index lane = 0; lane < LANES; lane++) {
    total += sum[lane];
    small = small && most[lane] <= 1;
  }
  const float shrink = 1 / (1 + total);
  for (Index at = 0; at < width; at += LANES) {
    const Vector share = load(p + at), d = (load(change + at) - share * total) * shrink;
    store(change + at, d);
    store(moved + at, share + d);
  }
  return small;
}

struct Head {  // one head of one example: base values, and room for those of a perturbation
  const Attention& call;
  Matrix a, b, v, p, da, db, dv, moved_a, dp, moved_p, out;

  explicit Head(const Attention& c)
      : call(c), a(c.rows, c.inner), b(c.inner, c.keys), v(c.keys, c.features), p(c.rows, c.keys), da(a), db(b), dv(v),
        moved_a(a), dp(p), moved_p(p), out(c.rows, c.features) {}

  void take(Index example, Index head) {
    const auto base = [&](const Operand& x, Matrix& to, float factor) {
      to.copy(x.base + example * x.strides[0] + head * x.strides[1], x.strides[2], x.strides[3], factor);
    };
    base(call.a, a, float(call.scale));
    base(call.b, b, 1);
    base(call.v, v, 1);
    p.copy(call.shares + (example * call.heads + head) * call.rows * call.keys, call.keys, 1, 1);
  }

  bool perturb(Index perturbation, Index example, Index head) {
    const auto change = [&](const Operand& x, Matrix& to, float factor) {
      if (x.change)
        to.copy(x.change + perturbation * x.moved[0] + example * x.moved[1] + head * x.moved[2], x.moved[3],
                x.moved[4], factor);
      return x.change != nullptr;
    };
    const bool a_moves = change(call.a, da, float(call.scale)), b_moves = change(call.b, db, 1);
    const bool v_moves = change(call.v, dv, 1), p_moves = a_moves || b_moves;
    if (a_moves) moved_a.add(a, da);
    bool small = true;
    if (p_moves) {
      sum_of_products(a_moves ? &da : nullptr, &b, b_moves ? (a_moves ? &moved_a : &a) : nullptr, &db, dp);
      for (Index r = 0; r < p.rows; r++) small &= normalise_row(p.row(r), dp.row(r), moved_p.row(r), p.width);
    }
    sum_of_products(p_moves ? &dp : nullptr, &v, v_moves ? (p_moves ? &moved_p : &p) : nullptr, &dv, out);
    for (Index r = 0; r < out.rows; r++) {
      const Index place = ((perturbation * call.batch + example) * call.rows + r) * call.heads + head;
      std::copy(out.row(r), out.row(r) + call.features, call.out + place * call.features);
    }
    return small;
  }
};

static bool attend(const Attention& call, int threads) {
  bool small = true;
#pragma omp parallel num_threads(threads) reduction(&& : small)
  {
    Head head(call);
#pragma omp for schedule(static)
    for (Index n = 0; n < call.batch * call.heads; n++) {
      head.take(n / call.heads, n % call.heads);
      for (Index k = 0; k < call.count; k++) small = head.perturb(k, n / call.heads, n % call.heads) && small;
    }
  }
  return small;
}
