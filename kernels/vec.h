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
#define CLIPFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CLIPFAST_INLINE inline __attribute__((always_inline))

namespace clipfast {

using torch::stable::Tensor;

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

}  // namespace clipfast
