// The sigmoid loss for Hopper: loss, gradients and the bias's gradient in one sweep of S, G = σ(l) through blocks in 16 bit.
//
// With e = 2^(-|l|·log2 e): softplus(l) = max(l, 0) + log(1 + e) and σ(l) = (l < 0 ? e : 1) / (1 + e), which keep the digits of small
// values. The logarithms of a row cost one a tile and thread: Π(1 + e) - 1, q ← q + e + q·e, stays below 2⁶⁴ and has only positive
// terms. Two of the 16 special functions a cycle for each element: 4,096 cycles a tile, hidden behind the other warpgroup's products
// from D = 512 on.
//
// Where a row has its pair, l is negated: loss softplus(-l), gradient -σ(-l).
#include "similarity.cuh"

#include <tuple>

namespace clipfast {
namespace {

constexpr float kUnit = 1.0f / 4096.0f;  // G lies between -1 and 1: in fp16, 1e-11 is the least that counts

// `kept`: G is written, and the text arranged for it.
template <class T, bool kept> struct Sigmoid {
  struct Arguments {
    const float *scale, *bias;
    float2* parts;  // [parts, rows]: loss, gradient of the bias
    T* G;
    int64_t offset, pitch;
    int rows, columns;
  };
  const Arguments& given;
  const Seat& seat;
  const float scale, bias;
  int first;
  float loss[2], slope[2];

  __device__ Sigmoid(const Arguments& given, const Seat& seat, float*)
      : given(given), seat(seat), scale(*given.scale), bias(*given.bias) {}

  __device__ void start(int block) {
    first = seat.row(block);
    for (int h = 0; h < 2; ++h) loss[h] = slope[h] = 0.0f;
  }

  __device__ void fetch(int) {}

  __device__ void tile(float (&s)[128], int column) {
    const int pair = pair_in_tile(first, given.offset, column);
    float factor = scale, shift = bias, own[2] = {-INFINITY, -INFINITY};
    if (pair < kColumns || column + kColumns > given.columns) {  // s becomes l, -∞ beyond the columns
      factor = 1.0f, shift = 0.0f;
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        const int h = i / 2 % 2, in_tile = i / 4 * 8 + 2 * (seat.lane % 4) + i % 2, at = kept ? arranged(in_tile) : in_tile;
        const float l = fmaf(s[i], scale, bias);
        s[i] = column + at >= given.columns ? -INFINITY : at == pair + 8 * h ? -l : l;
        if (at == pair + 8 * h) own[h] = s[i];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float linear = 0.0f, product = 0.0f, sum = 0.0f;
      T* const out = kept ? given.G + (first + 8 * h) * given.pitch + column + 8 * (seat.lane % 4) : nullptr;
#pragma unroll
      for (int part = 0; part < 8; ++part) {
        float g[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float l = fmaf(s[16 * part + i / 2 * 4 + 2 * h + i % 2], factor, shift), e = exp2_fast(-fabsf(l) * kLog2E);
          linear += fmaxf(l, 0.0f);
          product = fmaf(product, e, product + e);
          sum += g[i] = sigmoid(l, e);
        }
        if (kept) store(out + 32 * part, g);
      }
      const float at_pair = sigmoid(own[h], exp2_fast(-fabsf(own[h]) * kLog2E));  // of -l; 0 without a pair
      if (kept && own[h] > -INFINITY) out[pair + 8 * h - 8 * (seat.lane % 4)] = narrow<T>(-at_pair);
      loss[h] += linear + log1pf(product);
      slope[h] += (sum - 2.0f * at_pair) * kUnit;
    }
  }

  // In units
  static __device__ float sigmoid(float l, float e) { return (l < 0.0f ? e : 1.0f) * reciprocal(fmaf(e, kUnit, kUnit)); }

  __device__ void finish() {
    for (int h = 0; h < 2; ++h) {
      const float2 sums = make_float2(quad_sum(loss[h]), quad_sum(slope[h]));
      if (const int row = first + 8 * h; seat.lane % 4 == 0 && row < given.rows)
        given.parts[static_cast<int64_t>(seat.part) * given.rows + row] = sums;
    }
  }
};

// parts: [count, rows] -> loss, slope [rows], added to where `more`
__global__ void sum_kernel(const float2* parts, int count, int rows, bool more, float* loss, float* slope) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float2 sum = more ? make_float2(loss[row], slope[row]) : make_float2(0.0f, 0.0f);
  for (int p = 0; p < count; ++p) {
    const float2 part = parts[static_cast<int64_t>(p) * rows + row];
    sum = make_float2(sum.x + part.x, sum.y + part.y);
  }
  loss[row] = sum.x;
  slope[row] = sum.y;
}

__global__ void factors_kernel(Factors* factors) { *factors = Factors{kUnit}; }

template <class T>
void forward(
    const Call& call, const Problem<T>& p, const float* bias, float* loss, float* slope, float* image_grad, float* text_grad) {
  const bool kept = image_grad || text_grad;
  const int64_t rows = kept ? make_block(p.n, p.N, p.D, call.sms).rows : p.n;
  const auto parts = static_cast<float2*>(call.allocate(std::max(1, call.sms / kCluster) * rows * sizeof(float2)));
  const auto run = [&](auto writes, const Problem<T>& b, int64_t text_rows, int64_t row, int64_t column, T* G, int64_t pitch) {
    const Plan plan = make_plan(b.n, b.N, b.D, call.sms);
    const int n = static_cast<int>(b.n), N = static_cast<int>(b.N);
    sweep<T, Sigmoid<T, writes>>(call, b, text_rows, plan, {p.scale, bias, parts, G, b.offset, pitch, n, N});
    launch(call, sum_kernel, {divide_up(n, 256), 256}, parts, plan.parts, n, column > 0, loss + row, slope + row);
  };
  if (!kept) return run(std::false_type{}, p, p.N, 0, 0, static_cast<T*>(nullptr), 0);
  const auto factors = static_cast<Factors*>(call.allocate(sizeof(Factors)));
  launch(call, factors_kernel, {1, 32}, factors);
  gradients(call, p, factors, image_grad, text_grad, [&](const auto&... block) { run(std::true_type{}, block...); });
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias_, int64_t offset, bool want_image,
    bool want_text) {
  const Inputs in("pairwise_sigmoid", image, text, scale, offset);
  const Tensor bias = to(bias_, ScalarType::Float), loss = in.floats(in.n), slope = in.floats(in.n);
  const Tensor image_grad = in.gradient(want_image ? in.n : 0), text_grad = in.gradient(want_text ? in.N : 0);
  constexpr auto at = data<float>;
  in.run([&](const auto& p) { forward(in.call, p, at(bias), at(loss), at(slope), wanted(image_grad), wanted(text_grad)); });
  return {loss, slope, image_grad, text_grad};
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) { m.impl("pairwise_sigmoid_cuda", TORCH_BOX(&forward_op)); }
#endif

}  // namespace
}  // namespace clipfast
