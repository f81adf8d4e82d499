// Attention for short sequences on the CPU, fp32. One task is one head of one sequence: it reads q, k, v where the projection left
// them and writes where the next one reads, so that nothing is split, padded or transposed.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

namespace clipfast {
namespace {

using namespace head;

template <int w>
CLIPFAST_INLINE void softmax_backward_of(
    float* S, float* dP, int64_t keys, int64_t lanes, bool causal, int64_t first, const float* lse, float factor) {
  for (int64_t l = 0; l < lanes; l += w) {
    const typename Vector<w>::Floats denominator = at<w>(lse + l);
    typename Vector<w>::Floats dot = {};
    for (int64_t j = 0; j < keys; ++j) {
      float* p = S + j * lanes + l;
      at<w>(p) -= denominator;
      if (causal && j > first + l) hide_later<w>(p, j, first + l);
      exponentiate<w>(p);
      dot += at<w>(p) * at<w>(dP + j * lanes + l);
    }
    for (int64_t j = 0; j < keys; ++j) {
      float* d = dP + j * lanes + l;
      at<w>(d) = factor * at<w>(S + j * lanes + l) * (at<w>(d) - dot);
    }
  }
}

// From S[keys][lanes] and dP[keys][lanes]: P into S, and dS = factor · P·(dP − ⟨P, dP⟩) into dP.
constexpr auto softmax_backward = kernel<softmax_backward_of<kWideFloats>, softmax_backward_of<kNarrowFloats>>;

int64_t backward_scratch(int64_t L, int64_t K) { return 2 * kBlock * (K + L) + 2 * L * K; }

// dout: rows `ldo` apart; dq, dk, dv: rows `ldd` apart; scratch: backward_scratch(L, K) floats.
void backward_head(
    const Sequence& s, const float* q, const float* k_, const float* v_, int64_t stride, const float* dout, int64_t ldo,
    const float* lse, float* dq, float* dk, float* dv, int64_t ldd, float* scratch) {
  float *Q = scratch, *dO = Q + kBlock * s.K, *S = dO + kBlock * s.K, *dP = S + kBlock * s.L, last[kBlock] = {};
  scratch = dP + kBlock * s.L;
  const Rows k = gathered({k_, stride}, s, scratch), v = gathered({v_, stride}, s, scratch);
  // From the last block on: it alone reaches every key when causal, so it writes dk and dv, and the others add.
  for (int64_t first = (s.L - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
    const int64_t count = std::min(kBlock, s.L - first), lanes = lanes_of(count), keys = s.causal ? first + count : s.L;
    const bool add = first + kBlock < s.L;
    transpose(q + first * stride, stride, count, s.K, lanes, s.scale, Q);
    transpose(dout + first * ldo, ldo, count, s.K, lanes, 1.0f, dO);
    product({k.p, k.stride, 1}, Q, lanes, S, lanes, keys, lanes, s.K, false);
    product({v.p, v.stride, 1}, dO, lanes, dP, lanes, keys, lanes, s.K, false);
    std::copy_n(lse + first, count, last);
    softmax_backward(S, dP, keys, lanes, s.causal, first, last, s.scale);
    product({dP, 1, lanes}, k.p, k.stride, dq + first * ldd, ldd, count, s.K, keys, false);
    product({dP, lanes, 1}, q + first * stride, stride, dk, ldd, keys, s.K, count, add);
    product({S, lanes, 1}, dout + first * ldo, ldo, dv, ldd, keys, s.K, count, add);
  }
}

// Where the sequences lie: B of them, sequence b of length(b) from token start(b) on.
struct Layout {
  int64_t B, T, L, C, K, heads;
  const int32_t* ends;
  Tensor kept;

  Layout(const Tensor& qkv, const std::optional<Tensor>& cu_seqlens, int64_t heads_)
      : C(qkv.size(qkv.dim() - 1) / 3), K(C / heads_), heads(heads_), ends(nullptr), kept(qkv) {
    if (cu_seqlens) {
      kept = contiguous(*cu_seqlens);
      ends = static_cast<const int32_t*>(kept.data_ptr());
      B = kept.numel() - 1, T = qkv.size(0), L = 0;
      STD_TORCH_CHECK(
          ends[0] == 0 && ends[B] == T, "attention: expected cu_seqlens to run from 0 to ", T, ", got ", ends[0], " to ", ends[B]);
      for (int64_t b = 0; b < B; ++b) {
        STD_TORCH_CHECK(ends[b] <= ends[b + 1], "attention: expected rising cu_seqlens, got ", ends[b], " before ", ends[b + 1]);
        L = std::max<int64_t>(L, ends[b + 1] - ends[b]);
      }
    } else {
      B = qkv.size(0), L = qkv.size(1), T = B * L;
    }
  }
  int64_t start(int64_t b) const { return ends ? ends[b] : b * L; }
  int64_t length(int64_t b) const { return ends ? ends[b + 1] - ends[b] : L; }
  // The first row of sequence b in x [B, L, ·] or [T, ·]; rows are x.stride(-2) apart.
  const float* rows(const Tensor& x, int64_t b) const {
    return floats(x) + (ends ? ends[b] * x.stride(0) : b * x.stride(0));
  }
};

// task(b, h, scratch) for every head of every sequence, with `floats` of scratch of its own.
template <typename Task>
void each_head(const Layout& at, int64_t floats, Task task) {
  // A share below about 2^18 multiply-adds (5 µs) costs more to hand out than to do.
  const int64_t work = std::max<int64_t>(1, at.T / std::max<int64_t>(1, at.B) * at.L * at.K);
  torch::stable::parallel_for(0, at.B * at.heads, std::max<int64_t>(1, (1 << 18) / work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float, decltype(&std::free)> scratch(
        static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), &std::free);
    for (int64_t t = begin; t < end; ++t)
      if (at.length(t / at.heads)) task(t / at.heads, t % at.heads, scratch.get());
  });
}

Tensor with_contiguous_rows(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : contiguous(x); }

std::tuple<Tensor, Tensor> forward(const Tensor& qkv_, const std::optional<Tensor>& cu_seqlens, int64_t heads, bool causal, int64_t) {
  const Tensor qkv = with_contiguous_rows(qkv_);
  const Layout layout(qkv, cu_seqlens, heads);
  const int64_t C = layout.C, K = layout.K, T = layout.T, stride = qkv.stride(qkv.dim() - 2);
  Tensor out = cu_seqlens ? new_empty(qkv, {T, C}) : new_empty(qkv, {layout.B, layout.L, C}), lse = new_empty(qkv, {heads, T});
  auto *outp = mutable_floats(out), *lsep = mutable_floats(lse);
  each_head(layout, forward_scratch(layout.L, K), [&](int64_t b, int64_t h, float* scratch) {
    const Sequence s{layout.length(b), K, causal, 1.0f / std::sqrt(static_cast<float>(K))};
    const float* q = layout.rows(qkv, b) + h * K;
    const int64_t t = layout.start(b);
    forward_head(s, q, q + C, q + 2 * C, stride, outp + t * C + h * K, C, lsep + h * T + t, scratch);
  });
  return {out, lse};
}

Tensor backward(
    const Tensor& dout_, const Tensor&, const Tensor& lse_, const Tensor& qkv_, const std::optional<Tensor>& cu_seqlens, int64_t heads,
    bool causal, int64_t) {
  const Tensor qkv = with_contiguous_rows(qkv_), dout = with_contiguous_rows(dout_), lse = contiguous(lse_);
  const Layout layout(qkv, cu_seqlens, heads);
  const int64_t C = layout.C, K = layout.K, T = layout.T, stride = qkv.stride(qkv.dim() - 2), ldo = dout.stride(dout.dim() - 2);
  Tensor dqkv = new_empty(qkv, qkv.sizes());
  auto* dp = mutable_floats(dqkv);
  const auto* lsep = floats(lse);
  each_head(layout, backward_scratch(layout.L, K), [&](int64_t b, int64_t h, float* scratch) {
    const Sequence s{layout.length(b), K, causal, 1.0f / std::sqrt(static_cast<float>(K))};
    const float* q = layout.rows(qkv, b) + h * K;
    const int64_t t = layout.start(b);
    float* dq = dp + t * 3 * C + h * K;
    backward_head(
        s, q, q + C, q + 2 * C, stride, layout.rows(dout, b) + h * K, ldo, lsep + h * T + t, dq, dq + C, dq + 2 * C, 3 * C, scratch);
  });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&forward));
  m.impl("attention_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
