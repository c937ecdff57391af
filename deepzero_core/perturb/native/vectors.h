// Vectors over the batch, and the two multiply-adds that products are made of.
//
// Tensors are "batch-last": the examples of the batch are the innermost axis, so that every operator, whatever its
// channels and windows, is the same arithmetic on whole vectors. A batch of B >= LANES examples is covered by full
// vectors; the last one overlaps its neighbour and computes the same values again.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

using Index = int64_t;

// A tile of ROWS output channels by VECTORS vectors is accumulated in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3, VECTORS = 4;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(LANES * 4)));

static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
static inline Vector all(float value) { return Vector{} + value; }
// NaN in the first operand is kept, as torch.maximum keeps it.
static inline Vector at_least(Vector value, Vector floor) { return value < floor ? floor : value; }
static inline Vector larger(Vector best, Vector next) { return (next > best) | (next != next) ? next : best; }

// One input channel per step: sum += w * x.
struct Float32 {
  static Vector add(Vector sum, float weight, Vector x) { return sum + weight * x; }
};

// Two input channels per step, as bfloat16 in the halves of a 32-bit lane: sum += w0 * x0 + w1 * x1 in float32.
struct BFloat16 {
#if defined(__AVX512BF16__)
  static Vector add(Vector sum, float weight, Vector x) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all(weight), (__m512bh)x);
  }
#endif
  static Bits rounded(Vector x) {  // to nearest even
    Bits bits = (Bits)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static Vector pack(Vector low, Vector high) { return (Vector)((rounded(low) & 0xffff) | (rounded(high) << 16)); }
};

// Calls `tile` with (number of vectors, first example) until the batch is covered.
template <class Tile>
static inline void over_batch(Index batch, Tile tile) {
  for (Index at = 0; at < batch;) {
    Index vectors = std::min<Index>(VECTORS, (batch - at) / LANES);
    if (vectors == 0) return tile(Index(1), batch - LANES);
    tile(vectors, at);
    at += vectors * LANES;
  }
}

// Calls `vector` with the place of every vector that covers a run of length >= LANES.
template <class Vectors>
static inline void over_run(Index length, Vectors vector) {
  for (Index at = 0; at + LANES <= length; at += LANES) vector(at);
  if (length % LANES) vector(length - LANES);
}

// Calls `block` with (width, first row): `count` rows in nearly equal blocks of at most ROWS.
template <class Block>
static inline void over_rows(Index count, Block block) {
  const Index blocks = (count + ROWS - 1) / ROWS;
  for (Index k = 0; k < blocks; k++) {
    const Index first = count * k / blocks;
    block(count * (k + 1) / blocks - first, first);
  }
}

// The compile-time equivalents of a tile's run-time size.
template <int LIMIT, class Function>
static inline void with_constant(Index value, Function function) {
  if constexpr (LIMIT > 1) {
    if (value < LIMIT) return with_constant<LIMIT - 1>(value, function);
  }
  function(std::integral_constant<int, LIMIT>{});
}
