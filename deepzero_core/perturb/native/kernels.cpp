// What Python calls: see kernels.py for the shapes.
#include "chain.h"
#include "winograd.h"

extern "C" {

int lanes() { return LANES; }

int has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

void deepzero_convolve(const Shape* shape, const float* x, const float* weight, const Index* start, Index count,
                       float* out, int threads) {
  convolve<Float32>(*shape, x, weight, start, count, out, threads);
}

void deepzero_winograd(const Shape* shape, const float* x, const float* u, Index count, float* out, int threads) {
  winograd(*shape, x, u, count, out, threads);
}

#if defined(__AVX512BF16__)
void deepzero_pair_channels(const float* x, Index count, Index channels, Index length, float* out, int threads) {
  pair_channels(x, count, channels, length, out, threads);
}

void deepzero_convolve_bfloat16(const Shape* shape, const float* x, const float* weight, const Index* start,
                                Index count, float* out, int threads) {
  convolve<BFloat16>(*shape, x, weight, start, count, out, threads);
}
#endif

void deepzero_chain(const Chain* chain, const Shape* pool, int rectify, Index count, int threads) {
  evaluate(*chain, pool, rectify, count, threads);
}

void deepzero_moments(const Chain* chain, Index count, int threads) { moments(*chain, count, threads); }
}
