// Layer norm for NVIDIA GPUs: a CTA takes rows, every thread the same columns of each, 16 bytes at a time.
//
// Bytes are the floor: forward reads x (and the residual) and writes y (and s), the row waiting in registers between its mean, its
// deviation and its result. Backward adds the gradients of gain and bias in registers over the rows of a CTA; a second kernel adds
// the CTAs' parts in order: no atomics, equal inputs give equal bits.
#include "device.cuh"

#include <algorithm>
#include <optional>
#include <tuple>

namespace clipfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWidest = 4096;  // channels: at fp32 eight vectors a thread, 32 registers of each operand

// The sum over the CTA, the same bits in every thread.
__device__ float sum_of_cta(float x) {
  __shared__ float parts[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  __syncthreads();  // parts may still be read from the call before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += parts[warp];
  return total;
}

// x, residual (may be null), y, s (null where residual is): [rows, C]; weight, bias: [C]; mean, rstd: [rows]. C % V == 0.
template <class T, class W, int kVectors>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* x, const T* residual, const W* weight, const W* bias, T* y, T* s, float* mean, float* rstd, int C, float eps) {
  constexpr int V = Vector<T>::kSize;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * C;
  float row[kVectors][V];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = (k * kThreads + threadIdx.x) * V;
    if (column >= C) continue;
    Vector<T> v = *reinterpret_cast<const Vector<T>*>(x + at + column);
    if (residual) {
      const Vector<T> r = *reinterpret_cast<const Vector<T>*>(residual + at + column);
#pragma unroll
      for (int i = 0; i < V; ++i) v.at[i] = narrow<T>(widen(v.at[i]) + widen(r.at[i]));  // what is normalised is what is returned
      *reinterpret_cast<Vector<T>*>(s + at + column) = v;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sum += row[k][i] = widen(v.at[i]);
  }
  const float centre = sum_of_cta(sum) / C;
  float square = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if ((k * kThreads + threadIdx.x) * V < C)
#pragma unroll
      for (int i = 0; i < V; ++i) square += (row[k][i] - centre) * (row[k][i] - centre);
  const float scale = rsqrtf(sum_of_cta(square) / C + eps);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = (k * kThreads + threadIdx.x) * V;
    if (column >= C) continue;
    Vector<T> out;
#pragma unroll
    for (int i = 0; i < V; ++i)
      out.at[i] = narrow<T>((row[k][i] - centre) * scale * widen(weight[column + i]) + widen(bias[column + i]));
    *reinterpret_cast<Vector<T>*>(y + at + column) = out;
  }
  if (threadIdx.x == 0) mean[blockIdx.x] = centre, rstd[blockIdx.x] = scale;
}

// dy, ds (may be null), s, dx: [rows, C]; parts: [2, CTAs, C], the gradients of gain and bias over this CTA's rows.
template <class T, class W, int kVectors>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const T* dy, const T* ds, const T* s, const W* weight, const float* mean, const float* rstd, T* dx, float* parts, int64_t rows,
    int C) {
  constexpr int V = Vector<T>::kSize;
  float dweight[kVectors][V] = {}, dbias[kVectors][V] = {};
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t at = r * C;
    const float centre = mean[r], scale = rstd[r];
    float g[kVectors][V], normal[kVectors][V];
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = (k * kThreads + threadIdx.x) * V;
      if (column >= C) continue;
      const Vector<T> up = *reinterpret_cast<const Vector<T>*>(dy + at + column);
      const Vector<T> in = *reinterpret_cast<const Vector<T>*>(s + at + column);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        normal[k][i] = (widen(in.at[i]) - centre) * scale;
        dweight[k][i] += widen(up.at[i]) * normal[k][i];
        dbias[k][i] += widen(up.at[i]);
        g[k][i] = widen(up.at[i]) * widen(weight[column + i]);
        sum += g[k][i];
        product += g[k][i] * normal[k][i];
      }
    }
    const float a = sum_of_cta(sum) / C, b = sum_of_cta(product) / C;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = (k * kThreads + threadIdx.x) * V;
      if (column >= C) continue;
      Vector<T> out, add;
      if (ds) add = *reinterpret_cast<const Vector<T>*>(ds + at + column);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = (g[k][i] - a - normal[k][i] * b) * scale;
        out.at[i] = narrow<T>(ds ? d + widen(add.at[i]) : d);
      }
      *reinterpret_cast<Vector<T>*>(dx + at + column) = out;
    }
  }
  float* own = parts + static_cast<int64_t>(blockIdx.x) * C;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int column = (k * kThreads + threadIdx.x) * V;
    if (column >= C) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      own[column + i] = dweight[k][i];
      own[static_cast<int64_t>(gridDim.x) * C + column + i] = dbias[k][i];
    }
  }
}

// parts: [2, count, C] -> dweight, dbias: [C]
template <class W>
__global__ void merge_kernel(const float* parts, W* dweight, W* dbias, int count, int C) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= C) return;
  float w = 0.0f, b = 0.0f;
  for (int i = 0; i < count; ++i) {
    w += parts[static_cast<int64_t>(i) * C + c];
    b += parts[static_cast<int64_t>(count + i) * C + c];
  }
  dweight[c] = narrow<W>(w);
  dbias[c] = narrow<W>(b);
}

// ---- the tail that knows torch ----

// Calls f(T{}, W{}) with the types of activations and gains, f(T, W, integral_constant) by the width below.
template <class F> void by_type(const Tensor& x, const Tensor& weight, const F& f) {
  const bool wide = weight.scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Half: return wide ? f(__half{}, float{}) : f(__half{}, __half{});
    case ScalarType::BFloat16: return wide ? f(__nv_bfloat16{}, float{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
    default: throw std::runtime_error("layer_norm on CUDA: expected float32, float16 or bfloat16");
  }
}

template <class T, class F> void by_width(int C, const F& f) {
  const int vectors = (C + kThreads * Vector<T>::kSize - 1) / (kThreads * Vector<T>::kSize);
  if (vectors <= 1) return f(std::integral_constant<int, 1>{});
  if (vectors <= 2) return f(std::integral_constant<int, 2>{});
  if (vectors <= 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, kWidest / (kThreads * Vector<T>::kSize)>{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const Tensor& bias_, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = contiguous(x_), weight = contiguous(weight_), bias = contiguous(bias_);
  const Tensor residual = residual_ ? contiguous(*residual_) : x;
  const int C = static_cast<int>(weight.numel());
  const int64_t rows = x.numel() / C;
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  Tensor y = new_empty(x, x.sizes()), s = residual_ ? new_empty(x, x.sizes()) : new_empty(x, {0});
  Tensor mean = new_empty(x, leading, ScalarType::Float), rstd = new_empty(x, leading, ScalarType::Float);
  if (rows == 0) return {y, s, mean, rstd};
  by_type(x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    by_width<T>(C, [&](auto vectors) {
      forward_kernel<T, W, decltype(vectors)::value><<<rows, kThreads, 0, stream_of(x)>>>(
          data<T>(x), residual_ ? data<T>(residual) : nullptr, data<W>(weight), data<W>(bias), data<T>(y),
          residual_ ? data<T>(s) : nullptr, data<float>(mean), data<float>(rstd), C, static_cast<float>(eps));
    });
  });
  check("layer_norm", cudaGetLastError());
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy_, const std::optional<Tensor>& ds_, const Tensor& s_, const Tensor& weight_, const Tensor& mean_,
    const Tensor& rstd_) {
  const torch::stable::accelerator::DeviceGuard guard(dy_.get_device_index());
  const Tensor dy = contiguous(dy_), s = contiguous(s_), weight = contiguous(weight_), mean = contiguous(mean_),
               rstd = contiguous(rstd_);
  const Tensor ds = ds_ ? contiguous(*ds_) : dy;
  const int C = static_cast<int>(weight.numel());
  const int64_t rows = s.numel() / C;
  int sms = 0;
  check("layer_norm", cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dy.get_device_index()));
  const int ctas = static_cast<int>(std::min<int64_t>(rows, 4 * sms));
  Tensor dx = new_empty(dy, dy.sizes()), dweight = new_empty(weight, {C}), dbias = new_empty(weight, {C});
  Tensor parts = new_empty(dy, {2, ctas, C}, ScalarType::Float);
  by_type(dy, weight, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    if (ctas > 0)
      by_width<T>(C, [&](auto vectors) {
        backward_kernel<T, W, decltype(vectors)::value><<<ctas, kThreads, 0, stream_of(dy)>>>(
            data<T>(dy), ds_ ? data<T>(ds) : nullptr, data<T>(s), data<W>(weight), data<float>(mean), data<float>(rstd),
            data<T>(dx), data<float>(parts), rows, C);
      });
    merge_kernel<W><<<(C + kThreads - 1) / kThreads, kThreads, 0, stream_of(dy)>>>(
        data<float>(parts), data<W>(dweight), data<W>(dbias), ctas, C);
  });
  check("layer_norm", cudaGetLastError());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CUDA, m) {
  m.impl("layer_norm_cuda", TORCH_BOX(&forward));
  m.impl("layer_norm_backward_cuda", TORCH_BOX(&backward));
}

}  // namespace clipfast
