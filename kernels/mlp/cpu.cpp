// Bias + QuickGELU on the CPU, fp32: one pass forward (read h, write y) and one backward (read dy and h, write dh and the bias
// gradient), where eager makes four and nine.
#include "vec.h"

#include <vector>

namespace clipfast {
namespace {

CLIPFAST_INLINE float gate(float x) { return 1.0f / (1.0f + exp_fp32(-1.702f * x)); }

// h, y: [rows, F]; bias: [F]
CLIPFAST_INLINE void forward_of(const float* h, const float* bias, float* y, int64_t rows, int64_t F) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f = 0; f < F; ++f) {
      const float x = h[r * F + f] + bias[f];
      y[r * F + f] = x * gate(x);
    }
}
constexpr auto forward_rows = kernel<forward_of>;

// dy, h, dh: [rows, F]; bias, dbias: [F], dbias added to
CLIPFAST_INLINE void backward_of(
    const float* dy, const float* h, const float* bias, float* dh, float* dbias, int64_t rows, int64_t F) {
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const float x = h[r * F + f] + bias[f];
      const float g = gate(x);
      const float d = dy[r * F + f] * g * (1.0f + 1.702f * x * (1.0f - g));
      dh[r * F + f] = d;
      dbias[f] += d;
    }
}
constexpr auto backward_rows = kernel<backward_of>;

constexpr int64_t kRows = 32;  // rows of one task: 32 × 3072 floats of three tensors are 1.2 MB, within L2

Tensor forward(const Tensor& h_, const Tensor& bias_, bool) {
  const Tensor h = contiguous(h_), bias = contiguous(bias_);
  Tensor y = new_empty(h, h.sizes());
  const int64_t F = bias.numel(), rows = F ? h.numel() / F : 0;
  const auto *hp = floats(h), *bp = floats(bias);
  auto* yp = mutable_floats(y);
  torch::stable::parallel_for(0, rows, kRows, [&](int64_t begin, int64_t end) {
    forward_rows(hp + begin * F, bp, yp + begin * F, end - begin, F);
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& h_, const Tensor& bias_, bool) {
  const Tensor dy = contiguous(dy_), h = contiguous(h_), bias = contiguous(bias_);
  Tensor dh = new_empty(h, h.sizes()), dbias = new_empty(bias, bias.sizes());
  const int64_t F = bias.numel(), rows = F ? h.numel() / F : 0, groups = (rows + kRows - 1) / kRows;
  const auto *dyp = floats(dy), *hp = floats(h),
             *bp = floats(bias);
  auto *dhp = mutable_floats(dh), *dbp = mutable_floats(dbias);
  // One partial bias gradient per group of rows, added in order: the same bits whatever the number of threads.
  std::vector<float> partial(groups * F, 0.0f);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t r = g * kRows, count = std::min(kRows, rows - r);
      backward_rows(dyp + r * F, hp + r * F, bp, dhp + r * F, partial.data() + g * F, count, F);
    }
  });
  std::fill(dbp, dbp + F, 0.0f);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t f = 0; f < F; ++f) dbp[f] += partial[g * F + f];
  return {dh, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("mlp_cpu", TORCH_BOX(&forward));
  m.impl("mlp_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
