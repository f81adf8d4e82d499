// Helpers of the CPU kernels.
#pragma once

#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// One clone of a function for each instruction set, chosen when the library loads. The loops inside must be ones that the compiler
// vectorises; every function that they call must be inlined into them.
#if defined(__x86_64__)
#define CLIPFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLIPFAST_CLONES
#endif
#define CLIPFAST_INLINE inline __attribute__((always_inline))

namespace clipfast {

using torch::stable::Tensor;

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
template <int w>
CLIPFAST_INLINE typename Vector<w>::Floats& at(float* p) {
  return *reinterpret_cast<typename Vector<w>::Floats*>(p);
}
template <int w>
CLIPFAST_INLINE const typename Vector<w>::Floats& at(const float* p) {
  return *reinterpret_cast<const typename Vector<w>::Floats*>(p);
}

// Every clone holds the code for both widths; the machine has registers of one. (VL, as a processor without it takes the AVX2 clone.)
#if defined(__x86_64__)
inline const bool kWide = __builtin_cpu_supports("avx512vl");
#else
inline const bool kWide = false;
#endif

// Asks for n floats from p on before a loop needs them, past the end or not. A loop over several arrays gains most: with it batch
// norm's backward runs at 49 GB/s from a Zen 5's L3, a core, and at 33 without.
CLIPFAST_INLINE void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

// An 8 × 8 block turned over in registers: scalars or gathers take several times as long.
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
