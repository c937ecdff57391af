// The change of softmax(a b) v, head by head while it is in the caches; see rules/attention.py.
//
//   D = da b + (a + da) db,   e = p expm1(D),   S = sum e,   dp = (e - p S)/(1 + S),   out = dp v + (p + dp) dv
#pragma once
#include "products.h"

struct Operand {  // of one factor: base [batch, heads, rows, columns] and change [count, ...]; null: it does not move
  const float *base, *change;
  Index strides[4], moved[5];
};

struct Attention {
  Index count, batch, heads, rows, inner, keys, features;
  Operand a, b, v;      // [rows, inner], [inner, keys], [keys, features]
  const float* shares;  // p [batch, heads, rows, keys], rows filled up with zeros to whole vectors
  float* out;           // [count, batch, rows, heads, features]
  double scale;         // of a b
};

// expm1(x) to 3e-8 of itself for |x| <= 1, its series; two halves, so that additions need not wait for each other.
static inline Vector small_expm1(Vector x) {
  const Vector square = x * x;
  const Vector even = 1 + square * (1 / 6.f + square * (1 / 120.f + square * (1 / 5040.f + square * (1 / 362880.f))));
  const Vector odd =
      1 / 2.f + square * (1 / 24.f + square * (1 / 720.f + square * (1 / 40320.f + square * (1 / 3628800.f))));
  return x * (even + x * odd);
}

static inline float total(Vector sum) {
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
  return sum[0];
}

// dp and p + dp of N rows from D, in place of it; `most` keeps the largest |D|.
template <int N>
static void normalise_rows(const float* p, float* change, float* moved, Index width, Vector& most) {
  Vector sum[N] = {};
  for (Index at = 0; at < width; at += LANES)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vector d = load(change + n * width + at), e = load(p + n * width + at) * small_expm1(d);
      most = larger(most, d < 0 ? -d : d);
      sum[n] += e;
      store(change + n * width + at, e);
    }
  float sums[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) sums[n] = total(sum[n]);
  for (Index at = 0; at < width; at += LANES)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vector share = load(p + n * width + at);
      const Vector d = (load(change + n * width + at) - share * sums[n]) * (1 / (1 + sums[n]));
      store(change + n * width + at, d);
      store(moved + n * width + at, share + d);
    }
}

// False where some |D| > 1 or is NaN.
static bool normalise(const View& p, Matrix& change, Matrix& moved) {
  Vector most = {};
  over_blocks<4>(p.rows, [&](Index rows, Index r) {
    with_constant<1, 4>(rows, [&](auto n) { normalise_rows<n>(p.row(r), change.row(r), moved.row(r), p.width, most); });
  });
  bool small = true;
  for (int lane = 0; lane < LANES; lane++) small = small && most[lane] <= 1;
  return small;
}

struct Head {  // one head of one example: base values, and room for those of a perturbation
  const Attention& call;
  Index example = 0, number = 0;
  Matrix a, b, v, da, db, dv, moved_a, dp, moved_p, out;
  View p = {};

  explicit Head(const Attention& c)
      : call(c), a(c.rows, c.inner), b(c.inner, c.keys), v(c.keys, c.features), da(a), db(b), dv(v), moved_a(a),
        dp(c.rows, c.keys), moved_p(dp), out(c.rows, c.features) {}

  void take(Index n) {
    example = n / call.heads, number = n % call.heads;
    const auto base = [&](const Operand& x, Matrix& to, float factor) {
      to.copy(x.base + example * x.strides[0] + number * x.strides[1], x.strides[2], x.strides[3], factor);
    };
    base(call.a, a, float(call.scale));
    base(call.b, b, 1);
    base(call.v, v, 1);
    p = {call.shares + n * call.rows * dp.width, call.rows, call.keys, dp.width};
  }

  bool perturb(Index perturbation) {
    const auto change = [&](const Operand& x, Matrix& to, float factor) {
      if (!x.change) return false;
      const float* from = x.change + perturbation * x.moved[0] + example * x.moved[1] + number * x.moved[2];
      to.copy(from, x.moved[3], x.moved[4], factor);
      return to.moves();  // a row of the weights behind the factors moves those of one head alone
    };
    const bool a_moves = change(call.a, da, float(call.scale)), b_moves = change(call.b, db, 1);
    const bool v_moves = change(call.v, dv, 1), p_moves = a_moves || b_moves;
    if (a_moves) moved_a.add(a, da);
    bool small = true;
    Product products[2];
    int count = 0;
    if (p_moves) {
      if (a_moves) products[count++] = {da.view(), b.view()};
      if (b_moves) products[count++] = {(a_moves ? moved_a : a).view(), db.view()};
      sum_of(products, count, dp);
      small = normalise(p, dp, moved_p);
    }
    count = 0;
    if (p_moves) products[count++] = {dp.view(), v.view()};
    if (v_moves) products[count++] = {p_moves ? moved_p.view() : p, dv.view()};
    sum_of(products, count, out);
    for (Index r = 0; r < out.rows; r++) {
      const Index place = ((perturbation * call.batch + example) * call.rows + r) * call.heads + number;
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
      head.take(n);
      for (Index k = 0; k < call.count; k++) small = head.perturb(k) && small;
    }
  }
  return small;
}
