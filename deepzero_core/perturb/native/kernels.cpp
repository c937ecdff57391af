// What Python calls: see program.py.
#include <omp.h>

#include <chrono>

#include "attention.h"
#include "dense.h"
#include "feed_forward.h"
#include "program.h"

extern "C" {

int lanes() { return LANES; }

int has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Seconds of a 3 x 3 convolution from 64 to 64 channels of 16 x 16, in bfloat16 or in float32.
double deepzero_winograd_seconds(int bfloat16) {
  const Shape shape = {64, 64, 16, 16, 16, 16, 3, 3, 1, 1, 1, 1, 1, 1};
  const std::vector<float> x(shape.channels * shape.length()), u(POINTS * shape.channels * shape.outputs);
  std::vector<float> out(shape.outputs * shape.out_length()), scratch(winograd_scratch(shape));
  double seconds = 0;
  for (int run = 0; run < 2; run++) {  // the first fills the caches
    const auto began = std::chrono::steady_clock::now();
    if (bfloat16) {
#if defined(__AVX512BF16__)
      winograd<BFloat16>(shape, x.data(), u.data(), out.data(), scratch.data());
#endif
    } else {
      winograd<Float32>(shape, x.data(), u.data(), out.data(), scratch.data());
    }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
  return seconds;
}

// Floats of scratch that a thread needs for a convolution.
Index deepzero_scratch(const Shape* shape, int winograd) {
  return winograd ? winograd_scratch(*shape) : 2 * VECTORS * shape->kernel_height * shape->kernel_width;
}

void deepzero_run(const Program* program, const Moved* moved, const float* steps, Index count, Index group, float* local,
                  float* shared, float** external, int threads) {
  Run run{*program, moved, steps, group, local, shared, external, {}, {}};
  execute(run, count, threads);
}

// 0 where some score moves by more than 1: the series does not hold.
int deepzero_attend(const Attention* call, int threads) { return attend(*call, threads); }

// 0 where some value between the products moves by more than the radius.
int deepzero_feed_forward(const FeedForward* call, int threads) { return feed_forward(*call, threads); }

void deepzero_layer_norm(const LayerNorm* call, int threads) { layer_norm(*call, threads); }

void deepzero_polynomial(const float* delta, const float* const* coefficients, Index terms, Index count, Index size,
                         float* out, int threads) {
  with_constant<2, 12>(terms, [&](auto n) { polynomial<n>(delta, coefficients, count, size, out, threads); });
}
}
