// Changes of whole tensors in one pass, where torch would take one for every sum and product.
#pragma once
#include <cmath>

#include "vectors.h"

constexpr Index TILE_FLOATS = 2048;  // what depends on base values alone stays in the caches for all perturbations

// out = delta * (c[0] + c[1]*delta + ...), all [count, size]; the coefficients [terms] of [size]; see rules/smooth.py.
template <int TERMS>
static void polynomial(const float* delta, const float* const* c, Index count, Index size, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index first = 0; first < size; first += TILE_FLOATS)
    for (Index k = 0; k < count; k++) {
      const float* from = delta + k * size;
      float* to = out + k * size;
#pragma omp simd
      for (Index i = first; i < std::min(first + TILE_FLOATS, size); i++) {
        float sum = c[TERMS - 1][i];
#pragma GCC unroll 16
        for (int term = TERMS - 2; term >= 0; term--) sum = c[term][i] + sum * from[i];
        to[i] = sum * from[i];
      }
    }
}

// delta [count, rows, width] of the columns from starts[perturbation] on, out [count, rows, columns]; gain [columns] or
// null: 1; see rules/layer_norm.py.
struct LayerNorm {
  Index count, rows, columns, width;
  const Index* starts;
  const float *delta, *centred, *scale, *gain;
  float* out;
};

static void normalise_row(const LayerNorm& call, Index perturbation, Index row) {
  const Index size = call.columns, width = call.width, start = call.starts[perturbation];
  const float* delta = call.delta + (perturbation * call.rows + row) * width;
  const float* centred = call.centred + row * size;
  float* out = call.out + (perturbation * call.rows + row) * size;
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (Index i = 0; i < width; i++) {
    sum += delta[i];
    squares += (2 * centred[start + i] + delta[i]) * delta[i];
  }
  const float mean = sum / size, variance = squares / size - mean * mean, scale = call.scale[row];
  const float moved = 1 / std::sqrt(1 / (scale * scale) + variance);
  const float rescale = -variance * (scale * moved) * (scale * moved) / (scale + moved);
  std::fill(out, out + size, -mean);
#pragma omp simd
  for (Index i = 0; i < width; i++) out[start + i] = delta[i] - mean;
#pragma omp simd
  for (Index i = 0; i < size; i++) {
    const float change = moved * out[i] + rescale * centred[i];
    out[i] = call.gain ? call.gain[i] * change : change;
  }
}

static void layer_norm(const LayerNorm& call, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index row = 0; row < call.rows; row++)
    for (Index k = 0; k < call.count; k++) normalise_row(call, k, row);
}
