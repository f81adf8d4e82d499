// Strips of 32 output channels of 8-bit weights, multiplied with rows of 8-bit integers: of a Linear, and of a whole encoder.
//
// Sums are the same integers by every instruction set: AVX-512 VNNI or AVX-VNNI where the processor has one, which multiply
// unsigned with signed bytes (a weight w goes in as w + 128, and 128 · Σ q comes off), else pairs of 16-bit integers in 32-bit
// sums. Pairs of bytes in 16-bit sums (maddubs) would saturate, or cost a bit of the weights, and multiply no faster on Zen.
#pragma once

#include "output.h"

#include <algorithm>
#include <limits>

namespace clipfast::int8 {

constexpr int64_t kDeep = 4;                         // a strip of weights: [C / 4][32][4] bytes
constexpr int64_t kStep = kStrip * kDeep;
constexpr float kLeast = 1e-36f;                     // spec.LEAST
constexpr int64_t kAhead = 96 * kStep;               // from memory 12 rows read 24 GB/s a core with 12 KB ahead, 17 with 2 KB

using Sixteen = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Eight = int32_t __attribute__((vector_size(32), aligned(4), may_alias));

template <class V, class T>
CLIPFAST_INLINE V& as(T* p) {
  return *reinterpret_cast<V*>(p);
}

// ---- the products of m rows with a strip: sums [m][32]. x: rows of `depth` integers, w: a strip.

#if defined(__x86_64__)
struct Avx512Vnni {
  using Integer = int8_t;
  static constexpr bool kOffset = true;
  static constexpr int kRows = 12;

  template <int m>
  CLIPFAST_INLINE static void tile(const int8_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    Sixteen s[m][2] = {};
    const Sixteen flip = Sixteen{} + static_cast<int32_t>(0x80808080);
    for (int64_t k = 0; k < depth; k += kDeep, w += kStep) {
      const Sixteen left = as<const Sixteen>(w) ^ flip, right = as<const Sixteen>(w + 64) ^ flip;
      __builtin_prefetch(w + kAhead);
      __builtin_prefetch(w + kAhead + 64);
#pragma GCC unroll 12
      for (int i = 0; i < m; ++i) {
        const Sixteen four = Sixteen{} + as<const int32_t>(x + i * depth + k);
        asm("vpdpbusd %2, %1, %0" : "+v"(s[i][0]) : "v"(left), "v"(four));
        asm("vpdpbusd %2, %1, %0" : "+v"(s[i][1]) : "v"(right), "v"(four));
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; ++i) {
      as<Sixteen>(sums + i * kStrip) = s[i][0];
      as<Sixteen>(sums + i * kStrip + 16) = s[i][1];
    }
  }
};

struct AvxVnni {
  using Integer = int8_t;
  static constexpr bool kOffset = true;
  static constexpr int kRows = 6;  // 6 × 2 sums and 3 operands of 8 lanes in 16 registers

  template <int m>
  CLIPFAST_INLINE static void tile(const int8_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    const Eight flip = Eight{} + static_cast<int32_t>(0x80808080);
    for (int64_t j = 0; j < kStrip; j += 16) {
      Eight s[m][2] = {};
      const int8_t* from = w + j * kDeep;
      for (int64_t k = 0; k < depth; k += kDeep, from += kStep) {
        const Eight left = as<const Eight>(from) ^ flip, right = as<const Eight>(from + 32) ^ flip;
#pragma GCC unroll 6
        for (int i = 0; i < m; ++i) {
          const Eight four = Eight{} + as<const int32_t>(x + i * depth + k);
          asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s[i][0]) : "x"(left), "x"(four));
          asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s[i][1]) : "x"(right), "x"(four));
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < m; ++i) {
        as<Eight>(sums + i * kStrip + j) = s[i][0];
        as<Eight>(sums + i * kStrip + j + 8) = s[i][1];
      }
    }
  }
};

struct Avx2 {
  using Integer = int16_t;
  static constexpr bool kOffset = false;
  static constexpr int kRows = 6;

  template <int m>
  CLIPFAST_INLINE static void tile(const int16_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    using Longs = int64_t __attribute__((vector_size(32), aligned(2), may_alias));
    using Bytes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
    // Four bytes of a channel widen to two pairs, whose sums stand side by side until the end.
    for (int64_t j = 0; j < kStrip; j += 8) {
      Eight s[m][2] = {};
      const int8_t* from = w + j * kDeep;
      for (int64_t k = 0; k < depth; k += kDeep, from += kStep) {
        Eight left, right;
        asm("vpmovsxbw %1, %0" : "=x"(left) : "m"(as<const Bytes>(from)));
        asm("vpmovsxbw %1, %0" : "=x"(right) : "m"(as<const Bytes>(from + 16)));
#pragma GCC unroll 6
        for (int i = 0; i < m; ++i) {
          const Longs four = Longs{} + as<const int64_t>(x + i * depth + k);
          Eight a, b;
          asm("vpmaddwd %2, %1, %0" : "=x"(a) : "x"(left), "x"(four));
          asm("vpmaddwd %2, %1, %0" : "=x"(b) : "x"(right), "x"(four));
          s[i][0] += a;
          s[i][1] += b;
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < m; ++i)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) sums[i * kStrip + j + 4 * h + c] = s[i][h][2 * c] + s[i][h][2 * c + 1];
    }
  }
};
#else
struct Plain {
  using Integer = int16_t;
  static constexpr bool kOffset = false;
  static constexpr int kRows = 1;

  template <int m>
  CLIPFAST_INLINE static void tile(const int16_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    std::fill(sums, sums + kStrip, 0);
    for (int64_t k = 0; k < depth; k += kDeep, w += kStep)
      for (int64_t c = 0; c < kStrip; ++c)
        for (int64_t l = 0; l < kDeep; ++l) sums[c] += static_cast<int32_t>(x[k + l]) * w[c * kDeep + l];
  }
};
#endif

// ---- rows of x as integers

// x: [C] -> q: [depth ≥ C], zeros behind C; the row's scale, NaN where x has NaN or infinity, and the sum of q.
template <class T>
CLIPFAST_INLINE void rounded(const float* x, int64_t C, int64_t depth, T* q, float& scale, int32_t& total) {
  int32_t most = 0;  // the bits of magnitudes are ordered as they are, with infinity and NaN on top
  for (int64_t c = 0; c < C; ++c) most = std::max(most, __builtin_bit_cast(int32_t, x[c]) & 0x7fffffff);
  const float magnitude = __builtin_bit_cast(float, most);
  const bool finite = most < 0x7f800000;
  scale = finite ? magnitude / 127.0f : std::numeric_limits<float>::quiet_NaN();
  total = 0;
  std::fill(q + (finite ? C : 0), q + depth, T{0});
  if (!finite) return;
  const float factor = magnitude >= kLeast ? 127.0f / magnitude : 0.0f;
  int32_t sum = 0;
  for (int64_t c = 0; c < C; ++c) {
    const int32_t v = static_cast<int32_t>(__builtin_rintf(x[c] * factor));
    q[c] = static_cast<T>(v);
    sum += v;
  }
  total = sum;
}

struct Integers {  // rows of 8-bit integers, as one of the sets reads them
  float* scale;     // [M]
  int32_t* totals;  // [M]
  void* q;          // [M, depth]
  int64_t depth;    // C, rounded up to fours
};

// x: [rows, C] -> the rows r.. of `to`.
template <class T>
CLIPFAST_INLINE void rounded_rows(const float* x, int64_t C, const Integers& to, int64_t r, int64_t rows) {
  for (int64_t i = r; i < r + rows; ++i, x += C)
    rounded(x, C, to.depth, static_cast<T*>(to.q) + i * to.depth, to.scale[i], to.totals[i]);
}

// ---- sums into numbers

struct Bytes {  // weights [N, C]
  const int8_t* strips;  // [N / 32][C / 4][32][4]
  const float* scale;    // [N]
};

template <class Set, int m>
CLIPFAST_INLINE void tile(const Integers& x, const Bytes& w, const Output& out, int64_t r, int64_t j) {
  alignas(64) int32_t sums[m * kStrip];
  Set::template tile<m>(static_cast<const typename Set::Integer*>(x.q) + r * x.depth, x.depth, w.strips + j * x.depth, sums);
  for (int64_t i = r; i < r + m; ++i) {
    const int32_t* s = sums + (i - r) * kStrip;
    const int32_t less = Set::kOffset ? 128 * x.totals[i] : 0;
    const float by = x.scale[i];
    put(out, i, j, [&](int64_t c) __attribute__((always_inline)) { return static_cast<float>(s[c] - less) * (by * w.scale[j + c]); });
  }
}

template <class Set, int m = Set::kRows>
CLIPFAST_INLINE void tile_of(int64_t rows, const Integers& x, const Bytes& w, const Output& out, int64_t r, int64_t j) {
  if constexpr (m > 1)
    if (rows < m) return tile_of<Set, m - 1>(rows, x, w, out, r, j);
  tile<Set, m>(x, w, out, r, j);
}

// Rows r.. with the channels j..j + 31.
template <class Set>
CLIPFAST_INLINE void strip(const Integers& x, const Bytes& w, const Output& out, int64_t r, int64_t rows, int64_t j) {
  // Even shares: 13 rows are 7 + 6, not 12 + 1, which would wait on the latency of two chains.
  for (int64_t tiles = ceil_div(rows, Set::kRows), m; tiles > 0; --tiles, r += m, rows -= m) {
    m = ceil_div(rows, tiles);
    tile_of<Set>(m, x, w, out, r, j);
  }
}

template <class Set>
constexpr auto strip_of() {
  using Strip = Sets<&strip<Set>, &strip<Set>>;
#if defined(__x86_64__)
  if constexpr (Set::kRows == Avx512Vnni::kRows) return &Strip::in_avx512;
  else return &Strip::in_avx2;
#else
  return &Strip::run;
#endif
}

// f(set) with the best that the processor has.
template <class F>
auto with_integers(const F& f) {
#if defined(__x86_64__)
  // A processor with AVX-512 that is held to AVX2 stands for those that have no more.
  static const bool wide_vnni = __builtin_cpu_supports("avx512vnni");
  static const bool narrow_vnni = __builtin_cpu_supports("avxvnni") && !__builtin_cpu_supports("avx512vl");
  if (wide && wide_vnni) return f(Avx512Vnni{});
  return narrow_vnni ? f(AvxVnni{}) : f(Avx2{});
#else
  return f(Plain{});
#endif
}

}  // namespace clipfast::int8
