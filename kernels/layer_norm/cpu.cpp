// Layer norm on the CPU, fp32: a row goes through the cache once, with the residual addition before it. Eager makes a pass of
// its own for the addition, and one more in backward for the gradient that joins from the residual stream.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace clipfast {
namespace {

constexpr int64_t kRows = 16;  // rows of one task: 16 × 768 floats of four tensors are 200 KB, within L2
constexpr int64_t kGroups = 64;  // at most, of rows with a partial sum of their own: 64 × 2 × 768 floats are 400 KB

// dy, ds (may be null), s, dx: [rows, C]; dweight, dbias: [C], added to
CLIPFAST_INLINE void backward_of(
    const float* dy, const float* ds, const float* s, const float* weight, const float* mean, const float* rstd, float* dx,
    float* dweight, float* dbias, int64_t rows, int64_t C) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *g = dy + r * C, *t = s + r * C;
    const float m = mean[r], scale = rstd[r];
    float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t c = 0; c < C; ++c) {
      const float normal = (t[c] - m) * scale, d = g[c] * weight[c];
      dweight[c] += g[c] * normal;
      dbias[c] += g[c];
      sum += d;
      product += d * normal;
    }
    const float a = sum / static_cast<float>(C), b = product / static_cast<float>(C);
    float* out = dx + r * C;
    if (ds) {
      const float* add = ds + r * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) out[c] = (g[c] * weight[c] - a - (t[c] - m) * scale * b) * scale + add[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) out[c] = (g[c] * weight[c] - a - (t[c] - m) * scale * b) * scale;
    }
  }
}
constexpr auto backward_rows = kernel<backward_of>;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const Tensor& bias_, double eps) {
  const Tensor x = contiguous(x_), weight = contiguous(weight_), bias = contiguous(bias_);
  const Tensor residual = residual_ ? contiguous(*residual_) : x;
  const int64_t C = weight.numel(), rows = C ? x.numel() / C : 0;
  Tensor y = new_empty(x, x.sizes()), s = residual_ ? new_empty(x, x.sizes()) : new_empty(x, {0});
  Tensor mean = new_empty(x, x.sizes().slice(0, x.dim() - 1)), rstd = new_empty(x, x.sizes().slice(0, x.dim() - 1));
  const float *xp = floats(x), *rp = residual_ ? floats(residual) : nullptr, *wp = floats(weight), *bp = floats(bias);
  float *yp = mutable_floats(y), *sp = mutable_floats(s), *mp = mutable_floats(mean), *dp = mutable_floats(rstd);
  torch::stable::parallel_for(0, rows, kRows, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    norm::forward_rows(
        xp + at, rp ? rp + at : nullptr, wp, bp, yp + at, rp ? sp + at : nullptr, mp + begin, dp + begin, end - begin, C,
        static_cast<float>(eps));
  });
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy_, const std::optional<Tensor>& ds_, const Tensor& s_, const Tensor& weight_, const Tensor& mean_,
    const Tensor& rstd_) {
  const Tensor dy = contiguous(dy_), s = contiguous(s_), weight = contiguous(weight_), mean = contiguous(mean_),
               rstd = contiguous(rstd_);
  const Tensor ds = ds_ ? contiguous(*ds_) : dy;
  const int64_t C = weight.numel(), rows = C ? s.numel() / C : 0, each = std::max(kRows, (rows + kGroups - 1) / kGroups),
                groups = (rows + each - 1) / each;
  Tensor dx = new_empty(dy, dy.sizes()), dweight = new_empty(weight, {C}), dbias = new_empty(weight, {C});
  const float *gp = floats(dy), *ap = ds_ ? floats(ds) : nullptr, *sp = floats(s), *wp = floats(weight), *mp = floats(mean),
              *rp = floats(rstd);
  float* xp = mutable_floats(dx);
  // One partial sum per group of rows, added in order: the same bits whatever the number of threads.
  std::vector<float> parts(2 * groups * C, 0.0f);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t r = group * each, at = r * C;
      float* part = parts.data() + 2 * group * C;
      backward_rows(
          gp + at, ap ? ap + at : nullptr, sp + at, wp, mp + r, rp + r, xp + at, part, part + C, std::min(each, rows - r), C);
    }
  });
  float *dw = mutable_floats(dweight), *db = mutable_floats(dbias);
  std::fill(dw, dw + C, 0.0f);
  std::fill(db, db + C, 0.0f);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t c = 0; c < C; ++c) {
      dw[c] += parts[2 * group * C + c];
      db[c] += parts[2 * group * C + C + c];
    }
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("layer_norm_cpu", TORCH_BOX(&forward));
  m.impl("layer_norm_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
