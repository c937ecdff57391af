// Vectors over examples of the batch, and the two multiply-adds that products are made of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

using Index = int64_t;

// A tile of ROWS output channels by VECTORS positions is accumulated in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3, VECTORS = 4;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));

static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
static inline Vector all(float value) { return Vector{} + value; }
// NaN in the first operand is kept, as torch.maximum keeps it.
static inline Vector at_least(Vector value, Vector floor) { return value < floor ? floor : value; }
static inline Vector larger(Vector best, Vector next) { return (next > best) | (next != next) ? next : best; }

// One input channel per word: sum += w * x.
struct Float32 {
  static constexpr int CHANNELS = 1;
  static Vector add(Vector sum, float weight, Vector x) { return sum + weight * x; }
};

#if defined(__AVX512BF16__)
// Two input channels per word, as bfloat16 in the halves of a 32-bit lane: sum += w0 * x0 + w1 * x1 in float32.
struct BFloat16 {
  static constexpr int CHANNELS = 2;
  static Vector add(Vector sum, float weight, Vector x) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all(weight), (__m512bh)x);
  }
  static Vector pack(Vector low, Vector high) {  // both rounded to nearest even, lanes interleaved
    alignas(64) static const int16_t INTERLEAVE[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Vector)_mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVE), both);
  }
};
#endif

// Calls `block` with (size, first): `count` things in nearly equal blocks of at most MOST.
template <Index MOST, class Block>
static inline void over_blocks(Index count, Block block) {
  const Index blocks = (count + MOST - 1) / MOST;
  for (Index k = 0; k < blocks; k++) {
    const Index first = count * k / blocks;
    block(count * (k + 1) / blocks - first, first);
  }
}

// Calls `function` with the compile-time equivalent of a value in FIRST … LAST.
template <int FIRST, int LAST, class Function>
static inline void with_constant(Index value, Function function) {
  if constexpr (FIRST < LAST) {
    if (value < LAST) return with_constant<FIRST, LAST - 1>(value, function);
  }
  function(std::integral_constant<int, LAST>{});
}
