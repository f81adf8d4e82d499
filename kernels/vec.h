// Helpers of the CPU kernels.
#pragma once

#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#define CLIPFAST_INLINE inline __attribute__((always_inline))

namespace clipfast {

using torch::stable::Tensor;

// Floats of the two kinds of registers that code is compiled for, and how many registers there are of the narrow ones.
#if defined(__x86_64__)
constexpr int kWideFloats = 16, kNarrowFloats = 8, kNarrowRegisters = 16;  // AVX-512, AVX2
inline bool wide = __builtin_cpu_supports("avx512vl");                     // as a processor without VL is taken for AVX2
#else
constexpr int kWideFloats = 4, kNarrowFloats = 4, kNarrowRegisters = 32;  // NEON has one kind
inline bool wide = false;
#endif

// One function for each instruction set, chosen at run time by `wide`, with code that is inlined into it whole: the loops inside
// must be ones that the compiler vectorises, and so must be what they call. Arguments are those of the code.
template <auto for_wide, auto for_narrow, class Type = decltype(for_narrow)>
struct Sets;
template <auto for_wide, auto for_narrow, class... Arguments>
struct Sets<for_wide, for_narrow, void (*)(Arguments...)> {
#if defined(__x86_64__)
  __attribute__((target("arch=x86-64-v4"))) static void in_avx512(Arguments... arguments) { for_wide(arguments...); }
  __attribute__((target("arch=x86-64-v3"))) static void in_avx2(Arguments... arguments) { for_narrow(arguments...); }
  static void run(Arguments... arguments) { wide ? in_avx512(arguments...) : in_avx2(arguments...); }
#else
  static void run(Arguments... arguments) { for_narrow(arguments...); }
#endif
};
template <auto for_wide, auto for_narrow = for_wide>
constexpr auto kernel = &Sets<for_wide, for_narrow>::run;

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// w floats anywhere in memory, one register: what is wider than a register the compiler puts on the stack (ten times slower).
template <int w>
struct Vector;
template <>
struct Vector<16> {
  using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Flags = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Vector<8> {
  using Floats = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Flags = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Vector<4> {
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
  using Flags = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
};
template <int w>
CLIPFAST_INLINE typename Vector<w>::Floats& at(float* p) {
  return *reinterpret_cast<typename Vector<w>::Floats*>(p);
}
template <int w>
CLIPFAST_INLINE const typename Vector<w>::Floats& at(const float* p) {
  return *reinterpret_cast<const typename Vector<w>::Floats*>(p);
}

// Asks for n floats from p on before a loop needs them, past the end or not. A loop over several arrays gains most: with it batch
// norm's backward runs at 49 GB/s from a Zen 5's L3, a core, and at 33 without.
CLIPFAST_INLINE void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

// A square block turned over in registers: scalars or gathers take several times as long.
constexpr int kSquare = kNarrowFloats;
CLIPFAST_INLINE void turn(Vector<4>::Floats (&r)[4]) {
  const Vector<4>::Floats t[4] = {
      __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7),
      __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7)};
  r[0] = __builtin_shufflevector(t[0], t[2], 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(t[0], t[2], 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(t[1], t[3], 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(t[1], t[3], 2, 3, 6, 7);
}
CLIPFAST_INLINE void turn(Vector<8>::Floats (&r)[8]) {
  Vector<8>::Floats t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// exp(x) in fp32 to 2 ulp over the whole range: 2^k · p(r) with r in [-ln2/2, ln2/2], as a loop that vectorises.
// The coefficients are the Taylor terms of degree 2 to 7, enough for 1 ulp at |r| ≤ 0.35. NaN stays NaN.
CLIPFAST_INLINE float exp_fp32(float x) {
  const float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  const float k = __builtin_rintf(clamped * 1.44269504f);
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // 2^k in two factors: k can be 128, whose exponent field alone would be infinity.
  const int32_t half = static_cast<int32_t>(k) >> 1;
  const int32_t rest = static_cast<int32_t>(k) - half;
  const float low = __builtin_bit_cast(float, (half + 127) << 23);
  const float high = __builtin_bit_cast(float, (rest + 127) << 23);
  return x < -103.97f ? 0.0f : p * low * high;
}

// exp(x) for x ≤ 88 to 2 ulp, in half the instructions: 1.6e-38 for anything below -87, which beside a sum of 1 is as good as 0.
// The coefficients are those of least relative error, 3e-9. NaN stays NaN.
CLIPFAST_INLINE float exp_to_88(float x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5·2^23: the last bits of the sum are k + 127, the exponent field of 2^k
  const float clamped = x < -87.0f ? -87.0f : x;
  const float sum = clamped * 1.44269504f + kRound, k = sum - kRound;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.38144672e-3f;
  p = p * r + 8.36878084e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  return p * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, sum) << 23);
}

}  // namespace clipfast

// For Python, which knows what the process is held to (processor.py).
extern "C" inline __attribute__((used, visibility("default"))) void clipfast_hold_to_avx2() { clipfast::wide = false; }
