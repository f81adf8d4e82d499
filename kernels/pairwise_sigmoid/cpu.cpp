// The pairwise sigmoid loss and its gradients on the CPU, fp32, in one sweep of gemm.h.
#include "gemm.h"

#include <utility>

namespace clipfast {
namespace {

struct Logistic {
  float softplus, sigmoid;  // of the same logit
};

// max(l, 0) + log1p(z) and 1 / (1 + exp(-l)) from z = exp(-|l|), both to a few ulp however small.
// log1p(z) = 2·artanh(u) with u = z / (2 + z) ≤ 1/3: u times a polynomial in u² of relative error 5e-9.
CLIPFAST_INLINE Logistic logistic(float l) {
  const float z = exp_to_88(-__builtin_fabsf(l)), u = z / (2.0f + z), q = u * u;
  float p = 1.40059948e-1f;
  p = p * q + 1.40009031e-1f;
  p = p * q + 2.00107634e-1f;
  p = p * q + 3.33332092e-1f;
  p = p * q + 1.0f;
  return {(l > 0.0f ? l : 0.0f) + 2.0f * u * p, (l > 0.0f ? 1.0f : z) / (1.0f + z)};
}

// s -> sigmoid(s + bias) in place, and for every row the sums of softplus and sigmoid, added to those of the cells before.
CLIPFAST_INLINE void transformed(const Cell& cell, float bias, float* loss, float* bias_grad) {
  for (int64_t i = 0; i < cell.rows; ++i) {
    float softplus[kPanel] = {}, sigmoid[kPanel] = {};
    for (int64_t c = 0; c < cell.columns; c += kPanel) {
      float* s = cell.panel(c) + i * kPanel;
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        const Logistic y = logistic(s[l] + bias);
        softplus[l] += y.softplus;
        sigmoid[l] += y.sigmoid;
        s[l] = y.sigmoid;
      }
    }
    float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
    for (int64_t l = 0; l < kPanel; ++l) {
      a += softplus[l];
      b += sigmoid[l];
    }
    loss[i] += a;
    bias_grad[i] += b;
  }
}
constexpr auto transform = kernel<transformed>;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& image_, const Tensor& text_, const Tensor& scale, const Tensor& bias_, int64_t offset, bool want_image,
    bool want_text) {
  const Tensor image = contiguous(image_), text = contiguous(text_);
  const int64_t n = image.size(0), N = text.size(0), D = image.size(1);
  Tensor loss = new_zeros(image, {n}), bias_grad = new_zeros(image, {n});
  Tensor image_grad = new_empty(image, {want_image ? n : 0, D}), text_grad = new_empty(image, {want_text ? N : 0, D});
  float *sum = mutable_floats(loss), *grad = mutable_floats(bias_grad);
  const float bias = *floats(in_fp32(bias_));
  sweep(
      image, text, *floats(in_fp32(scale)), want_image ? mutable_floats(image_grad) : nullptr,
      want_text ? mutable_floats(text_grad) : nullptr,
      [&](const Cell& cell) {
        // The pairs stand aside, as -inf, of which softplus and sigmoid are 1e-38: taken from the sums afterwards they would cancel.
        float own[kChunk];
        for (int64_t i = 0; i < cell.rows; ++i)
          if (cell.holds(cell.i + i + offset))
            own[i] = std::exchange(cell(cell.i + i, cell.i + i + offset), -std::numeric_limits<float>::infinity());
        transform(cell, bias, sum + cell.i, grad + cell.i);
        for (int64_t i = cell.i; i < cell.i + cell.rows; ++i)
          if (cell.holds(i + offset)) {
            const Logistic pair = logistic(-(own[i - cell.i] + bias));
            sum[i] += pair.softplus;
            grad[i] -= pair.sigmoid;
            cell(i, i + offset) = -pair.sigmoid;
          }
      },
      [](int64_t, int64_t) {});
  return {loss, bias_grad, image_grad, text_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) { m.impl("pairwise_sigmoid_cpu", TORCH_BOX(&forward)); }

}  // namespace clipfast
