// Layer norm of rows on the CPU, fp32.
#pragma once

#include "vec.h"

#include <cmath>

namespace clipfast::norm {

// x, residual (may be null), y, s (null where residual is): [rows, C]; weight, bias: [C]; mean, rstd: [rows]
CLIPFAST_INLINE void forward_of(
    const float* x, const float* residual, const float* weight, const float* bias, float* y, float* s, float* mean, float* rstd,
    int64_t rows, int64_t C, float eps) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* t = x + r * C;
    float sum = 0.0f;
    if (residual) {
      const float* add = residual + r * C;
      float* out = s + r * C;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < C; ++c) {
        const float v = t[c] + add[c];
        out[c] = v;
        sum += v;
      }
      t = out;
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < C; ++c) sum += t[c];
    }
    const float m = sum / static_cast<float>(C);
    float square = 0.0f;  // of the deviations: x² - mean² would cancel far from zero
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < C; ++c) square += (t[c] - m) * (t[c] - m);
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(C) + eps);
    float* out = y + r * C;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] = (t[c] - m) * scale * weight[c] + bias[c];
    mean[r] = m;
    rstd[r] = scale;
  }
}
constexpr auto forward_rows = kernel<forward_of>;

}  // namespace clipfast::norm
