// Batch norm of a training step on the CPU, fp32, channels-last: [rows, C] with rows = B·h·w.
//
// torch's own vectorises over C and is slow at the 8 to 64 channels of a small ResNet's first stages. Here rows are taken P / C at a
// time, P the smallest multiple of C that is at least 256: every loop runs over P neighbouring floats, in the order of memory.
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace clipfast {
namespace {

constexpr int64_t kAhead = 512;    // floats from what is read now to what is fetched
constexpr int64_t kBlock = 32768;  // floats of one task's block: 128 KB of each tensor, so that its second reading comes from L2

// Σ x and Σ (x - mean)² of a block, per place of the pattern.
CLIPFAST_INLINE void sums_of(const float* x, int64_t count, int64_t P, float* sum) {
  for (int64_t i = 0; i < count; i += P) {
    const int64_t n = std::min(P, count - i);
    fetch(x + i + kAhead, n);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) sum[p] += x[i + p];
  }
}
constexpr auto block_sums = kernel<sums_of>;

CLIPFAST_INLINE void squares_of(const float* x, int64_t count, int64_t P, const float* mean, float* squares) {
  for (int64_t i = 0; i < count; i += P) {
    const int64_t n = std::min(P, count - i);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) squares[p] += (x[i + p] - mean[p]) * (x[i + p] - mean[p]);
  }
}
constexpr auto block_squares = kernel<squares_of>;

template <bool kResidual, bool kRelu>
CLIPFAST_INLINE float normalised(float x, float scale, float shift, const float* residual) {
  float y = x * scale + shift;
  if (kResidual) y += *residual;
  return kRelu ? (y < 0.0f ? 0.0f : y) : y;  // NaN stays NaN
}

template <bool kResidual, bool kRelu>
CLIPFAST_INLINE void normalise(
    const float* x, const float* residual, const float* scale, const float* shift, float* y, int64_t count, int64_t P) {
  for (int64_t i = 0; i < count; i += P) {
    const int64_t n = std::min(P, count - i);
    fetch(x + i + kAhead, n);
    if (kResidual) fetch(residual + i + kAhead, n);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) y[i + p] = normalised<kResidual, kRelu>(x[i + p], scale[p], shift[p], residual + i + p);
  }
}

// The gradient before the ReLU, g = dy where y > 0. Both passes make it from dy and y: kept between them it would be one tensor
// more that the first pass writes, and the second would find less of the others in the cache.
template <bool kRelu>
CLIPFAST_INLINE float masked(float dy, float y) {
  return !kRelu || y > 0.0f ? dy : 0.0f;
}

// Σ g and Σ g·(x - mean) per place of the pattern.
template <bool kRelu>
CLIPFAST_INLINE void gradient_sums(
    const float* dy, const float* x, const float* y, const float* mean, float* sum, float* product, int64_t count, int64_t P) {
  for (int64_t i = 0; i < count; i += P) {
    const int64_t n = std::min(P, count - i);
    fetch(dy + i + kAhead, n), fetch(x + i + kAhead, n);
    if (kRelu) fetch(y + i + kAhead, n);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) {
      const float g = masked<kRelu>(dy[i + p], y[i + p]);
      sum[p] += g;
      product[p] += g * (x[i + p] - mean[p]);
    }
  }
}

// dx = a·g + b·(x - mean) + c per channel, and the residual's gradient g
template <bool kResidual, bool kRelu>
CLIPFAST_INLINE void input_gradient(
    const float* dy, const float* x, const float* y, const float* mean, const float* a, const float* b, const float* c, float* dx,
    float* dresidual, int64_t count, int64_t P) {
  for (int64_t i = 0; i < count; i += P) {
    const int64_t n = std::min(P, count - i);
    fetch(dy + i + kAhead, n), fetch(x + i + kAhead, n);
    if (kRelu) fetch(y + i + kAhead, n);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) {
      const float g = masked<kRelu>(dy[i + p], y[i + p]);
      if (kResidual) dresidual[i + p] = g;
      dx[i + p] = a[p] * g + b[p] * (x[i + p] - mean[p]) + c[p];
    }
  }
}

// Adds a block's means and squared deviations to those of all blocks before it; the factors are the same for every channel.
CLIPFAST_INLINE void merged(
    const float* mean, const float* squares, double share, double weight_of_gap, double* centre, double* total, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const double gap = mean[c] - centre[c];
    centre[c] += gap * share;
    total[c] += squares[c] + gap * gap * weight_of_gap;
  }
}
constexpr auto merge = kernel<merged>;

// total[c] += part[c]
CLIPFAST_INLINE void added(const float* part, double* total, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) total[c] += part[c];
}
constexpr auto add = kernel<added>;

struct Pattern {  // how [rows, C] is cut into blocks of whole patterns of P floats
  int64_t C, rows, P, block, blocks;
  Pattern(const Tensor& x) : C(x.size(1)), rows(x.numel() / C) {
    P = C * ((256 + C - 1) / C);
    block = P * std::max<int64_t>(1, kBlock / P);
    blocks = (rows * C + block - 1) / block;
  }
  int64_t count(int64_t b) const { return std::min(block, rows * C - b * block); }
  std::vector<float> repeated(const float* channel) const {
    std::vector<float> out(P);
    for (int64_t p = 0; p < P; p += C) std::copy(channel, channel + C, out.begin() + p);
    return out;
  }
  // Per channel, the sum over the places of a pattern.
  void folded(const std::vector<float>& places, float* channel) const {
    std::copy(places.begin(), places.begin() + C, channel);
    for (int64_t p = C; p < P; p += C)
      for (int64_t c = 0; c < C; ++c) channel[c] += places[p + c];
  }
};

template <class F>
void each_block(const Pattern& pattern, const F& f) {
  torch::stable::parallel_for(0, pattern.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b);
  });
}

// From the last to the first: what the pass before read last is still in the cache.
template <class F>
void each_block_back(const Pattern& pattern, const F& f) {
  torch::stable::parallel_for(0, pattern.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = end; b-- > begin;) f(b);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight_, const Tensor& bias_, double eps, bool relu) {
  const Pattern s(x);
  const Tensor weight = contiguous(weight_), bias = contiguous(bias_);
  Tensor y = empty_like(x), mean = new_empty(weight, {s.C}), rstd = new_empty(weight, {s.C});
  const float *xp = floats(x), *rp = residual ? floats(*residual) : xp;
  // Every block's mean and squared deviations, both taken while the block is in the cache, then merged in order (Chan et al. 1979).
  std::vector<float> means(s.blocks * s.C), squares(s.blocks * s.C);
  each_block(s, [&](int64_t b) {
    std::vector<float> sum(s.P, 0.0f), square(s.P, 0.0f);
    const int64_t count = s.count(b);
    block_sums(xp + b * s.block, count, s.P, sum.data());
    float* m = means.data() + b * s.C;
    s.folded(sum, m);
    for (int64_t c = 0; c < s.C; ++c) m[c] /= static_cast<float>(count / s.C);
    block_squares(xp + b * s.block, count, s.P, s.repeated(m).data(), square.data());
    s.folded(square, squares.data() + b * s.C);
  });
  std::vector<double> centre(s.C, 0.0), total(s.C, 0.0);
  double n = 0;
  for (int64_t b = 0; b < s.blocks; ++b) {
    const double rows = static_cast<double>(s.count(b) / s.C), share = rows / (n + rows), weight_of_gap = n * share;
    merge(means.data() + b * s.C, squares.data() + b * s.C, share, weight_of_gap, centre.data(), total.data(), s.C);
    n += rows;
  }
  std::vector<float> scale(s.C), shift(s.C);
  for (int64_t c = 0; c < s.C; ++c) {
    const double r = 1.0 / std::sqrt(total[c] / n + eps), w = floats(weight)[c];
    mutable_floats(mean)[c] = static_cast<float>(centre[c]);
    mutable_floats(rstd)[c] = static_cast<float>(r);
    scale[c] = static_cast<float>(r * w);
    shift[c] = static_cast<float>(floats(bias)[c] - centre[c] * r * w);
  }
  const auto scales = s.repeated(scale.data()), shifts = s.repeated(shift.data());
  const auto run = residual ? (relu ? kernel<normalise<true, true>> : kernel<normalise<true, false>>)
                            : (relu ? kernel<normalise<false, true>> : kernel<normalise<false, false>>);
  float* yp = mutable_floats(y);
  each_block_back(s, [&](int64_t b) {
    const int64_t at = b * s.block;
    run(xp + at, rp + at, scales.data(), shifts.data(), yp + at, s.count(b), s.P);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y, const Tensor& weight_, const Tensor& mean_,
    const Tensor& rstd_, double, bool residual) {
  const Pattern s(x);
  const Tensor weight = contiguous(weight_), mean = contiguous(mean_), rstd = contiguous(rstd_);
  Tensor dx = empty_like(x), dweight = new_empty(weight, {s.C}), dbias = new_empty(weight, {s.C});
  Tensor dresidual = residual ? empty_like(x) : new_empty(x, {0});
  float *dxp = mutable_floats(dx), *drp = residual ? mutable_floats(dresidual) : dxp;
  const float *dyp = floats(dy), *xp = floats(x), *yp = y ? floats(*y) : dyp;
  const auto means = s.repeated(floats(mean));
  std::vector<float> sums(s.blocks * s.C), products(s.blocks * s.C);
  const auto sum_up = y ? kernel<gradient_sums<true>> : kernel<gradient_sums<false>>;
  each_block(s, [&](int64_t b) {
    std::vector<float> sum(s.P, 0.0f), product(s.P, 0.0f);
    const int64_t at = b * s.block;
    sum_up(dyp + at, xp + at, yp + at, means.data(), sum.data(), product.data(), s.count(b), s.P);
    s.folded(sum, sums.data() + b * s.C);
    s.folded(product, products.data() + b * s.C);
  });
  std::vector<double> all_sums(s.C, 0.0), all_products(s.C, 0.0);
  for (int64_t b = 0; b < s.blocks; ++b) {
    add(sums.data() + b * s.C, all_sums.data(), s.C);
    add(products.data() + b * s.C, all_products.data(), s.C);
  }
  std::vector<float> a(s.C), b_(s.C), c_(s.C);
  for (int64_t c = 0; c < s.C; ++c) {
    const double sum = all_sums[c], product = all_products[c];
    const double r = floats(rstd)[c], w = floats(weight)[c], n = static_cast<double>(s.rows);
    mutable_floats(dbias)[c] = static_cast<float>(sum);
    mutable_floats(dweight)[c] = static_cast<float>(product * r);
    a[c] = static_cast<float>(w * r);
    b_[c] = static_cast<float>(-w * r * r * r * product / n);
    c_[c] = static_cast<float>(-w * r * sum / n);
  }
  const auto as = s.repeated(a.data()), bs = s.repeated(b_.data()), cs = s.repeated(c_.data());
  const auto run = residual ? (y ? kernel<input_gradient<true, true>> : kernel<input_gradient<true, false>>)
                            : (y ? kernel<input_gradient<false, true>> : kernel<input_gradient<false, false>>);
  each_block_back(s, [&](int64_t b) {
    const int64_t at = b * s.block;
    run(
        dyp + at, xp + at, yp + at, means.data(), as.data(), bs.data(), cs.data(), dxp + at, drp + at, s.count(b), s.P);
  });
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("batch_norm_cpu", TORCH_BOX(&forward));
  m.impl("batch_norm_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
