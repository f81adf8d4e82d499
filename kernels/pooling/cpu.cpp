// Pooling by one query on the CPU, fp32: one task is one sequence, whose tokens stay in cache between the scores and the sums.
//
// Two products do everything: `dots`, out[w][r] = x_r · w_w, which reduces along the rows of x, and `combine`, a sum of rows with
// weights. Both hold a tile of sums in registers. The heads of a sequence are too few to fill a GEMM's lanes, which is what eager pays for.
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace clipfast {
namespace {

struct Rows {  // row r at p + r·stride, its elements side by side
  const float* p;
  int64_t stride;
};

// The sum of the lanes, in halves: an order that vectorises.
template <int w>
CLIPFAST_INLINE float sum(const typename Vector<w>::Floats& v) {
  float s[w];
  for (int l = 0; l < w; ++l) s[l] = v[l];
#pragma GCC unroll 4
  for (int half = w / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) s[l] += s[l + half];
  return s[0];
}

// out[j·ldo + i] = x_i · w_j for i < m, j < n.
template <int w, int m, int n>
CLIPFAST_INLINE void dots_tile(Rows x, Rows weights, int64_t C, float* out, int64_t ldo) {
  using Floats = typename Vector<w>::Floats;
  Floats s[m][n] = {};
  for (int64_t c = 0; c < C; c += w) {
    Floats b[n];
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) b[j] = at<w>(weights.p + j * weights.stride + c);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) {
      const Floats a = at<w>(x.p + i * x.stride + c);
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) s[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) out[j * ldo + i] = sum<w>(s[i][j]);
}

template <int w, int n>
CLIPFAST_INLINE void dots_column(Rows x, int64_t L, Rows weights, int64_t C, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= L; i += 4) dots_tile<w, 4, n>({x.p + i * x.stride, x.stride}, weights, C, out + i, ldo);
  for (; i < L; ++i) dots_tile<w, 1, n>({x.p + i * x.stride, x.stride}, weights, C, out + i, ldo);
}

template <int w, int most>
CLIPFAST_INLINE void dots_of(Rows x, int64_t L, Rows weights, int64_t H, int64_t C, float* out) {
  for (int64_t h = 0; h < H;) {
    const int64_t n = std::min<int64_t>(most, H - h);
    const Rows from{weights.p + h * weights.stride, weights.stride};
    switch (n) {
      case 1: dots_column<w, 1>(x, L, from, C, out + h * L, L); break;
      case 2: dots_column<w, 2>(x, L, from, C, out + h * L, L); break;
      case 3: dots_column<w, 3>(x, L, from, C, out + h * L, L); break;
      default: dots_column<w, most>(x, L, from, C, out + h * L, L);
    }
    h += n;
  }
}

// Sums beside one another for four rows: of 32 registers 4 × 4 are sums, of AVX2's 16 they are 4 × 3.
constexpr int kBeside = kNarrowRegisters == 16 ? 3 : 4;

// out[H, L]: out[h·L + l] = x_l · w_h.
constexpr auto dots = kernel<dots_of<kWideFloats, 4>, dots_of<kNarrowFloats, kBeside>>;

struct Term {  // Σ_d weight(r, d) · rows_d, with weight (r, d) at p[r·row + d·column]
  const float* p;
  int64_t row, column;
  Rows rows;
  int64_t depth;
};

template <int w, int m, int n>
CLIPFAST_INLINE void combine_tile(const Term* terms, int count, int64_t r, int64_t c, float* out, int64_t ldo) {
  using Floats = typename Vector<w>::Floats;
  Floats s[m][n] = {};
  for (int t = 0; t < count; ++t) {
    const Term& term = terms[t];
    const float *a = term.p + r * term.row, *b = term.rows.p + c;
    for (int64_t d = 0; d < term.depth; ++d, a += term.column, b += term.rows.stride)
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) {
        const Floats v = at<w>(b + j * w);
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) s[i][j] += a[i * term.row] * v;
      }
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) at<w>(out + (r + i) * ldo + c + j * w) = s[i][j];
}

template <int w, int n>
CLIPFAST_INLINE void combine_columns(const Term* terms, int count, int64_t R, int64_t c, float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) combine_tile<w, 4, n>(terms, count, r, c, out, ldo);
  switch (R - r) {
    case 3: combine_tile<w, 3, n>(terms, count, r, c, out, ldo); break;
    case 2: combine_tile<w, 2, n>(terms, count, r, c, out, ldo); break;
    case 1: combine_tile<w, 1, n>(terms, count, r, c, out, ldo); break;
  }
}

template <int w, int n>
CLIPFAST_INLINE void combine_of(const Term* terms, int count, int64_t R, int64_t C, float* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + n * w <= C; c += n * w) combine_columns<w, n>(terms, count, R, c, out, ldo);
  for (; c < C; c += w) combine_columns<w, 1>(terms, count, R, c, out, ldo);
}

// out[R, C] = the sum of the terms.
constexpr auto combine = kernel<combine_of<kWideFloats, 4>, combine_of<kNarrowFloats, kBeside>>;

// Scores S[H, L] -> S - top and top where lse is asked; then exp in one run over all heads.
CLIPFAST_INLINE void softmax_of(float* S, int64_t H, int64_t L, float* lse) {
  for (int64_t h = 0; h < H; ++h) {
    float top = -INFINITY;
    for (int64_t l = 0; l < L; ++l) top = S[h * L + l] > top ? S[h * L + l] : top;  // a NaN passes and comes out of exp
    for (int64_t l = 0; l < L; ++l) S[h * L + l] -= top;
    lse[h] = top;
  }
  for (int64_t i = 0; i < H * L; ++i) S[i] = exp_fp32(S[i]);
  for (int64_t h = 0; h < H; ++h) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < L; ++l) total += S[h * L + l];
    const float inverse = 1.0f / total;
    for (int64_t l = 0; l < L; ++l) S[h * L + l] *= inverse;
    lse[h] += std::log(total);
  }
}
constexpr auto softmax = kernel<softmax_of>;

// Scores S[H, L] -> P, and dP[H, L] -> dS = P·(dP − ⟨P, dP⟩).
CLIPFAST_INLINE void softmax_backward_of(float* S, float* dP, int64_t H, int64_t L, const float* lse) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t l = 0; l < L; ++l) S[h * L + l] -= lse[h];
  for (int64_t i = 0; i < H * L; ++i) S[i] = exp_fp32(S[i]);
  for (int64_t h = 0; h < H; ++h) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t l = 0; l < L; ++l) dot += S[h * L + l] * dP[h * L + l];
    for (int64_t l = 0; l < L; ++l) dP[h * L + l] = S[h * L + l] * (dP[h * L + l] - dot);
  }
}
constexpr auto softmax_backward = kernel<softmax_backward_of>;

// Where the sequences lie in x: [B, L, C], or [T, C] with cu_seqlens.
struct Layout {
  int64_t B, T, longest, H, C;
  bool packed;
  std::vector<int64_t> ends;

  Layout(const Tensor& x, const Tensor& u, const std::optional<Tensor>& cu_seqlens)
      : B(u.size(0)), H(u.size(1)), C(u.size(2)), packed(cu_seqlens.has_value()), ends(u.size(0) + 1) {
    if (packed) {
      const Tensor given = contiguous(*cu_seqlens);
      const auto* p = static_cast<const int32_t*>(given.data_ptr());
      std::copy(p, p + B + 1, ends.begin());
      T = x.size(0);
    } else {
      for (int64_t b = 0; b <= B; ++b) ends[b] = b * x.size(1);
      T = B * x.size(1);
    }
    STD_TORCH_CHECK(ends[0] == 0 && ends[B] == T, "pooling: expected cu_seqlens to run from 0 to ", T, ", got ", ends[0], " to ", ends[B]);
    longest = 0;
    for (int64_t b = 0; b < B; ++b) {
      STD_TORCH_CHECK(length(b) >= 0, "pooling: expected rising cu_seqlens, got ", ends[b], " before ", ends[b + 1]);
      longest = std::max(longest, length(b));
    }
  }

  int64_t length(int64_t b) const { return ends[b + 1] - ends[b]; }
  Rows tokens(const Tensor& x, int64_t b) const {
    const auto* p = floats(x);
    return packed ? Rows{p + ends[b] * x.stride(0), x.stride(0)} : Rows{p + b * x.stride(0), x.stride(1)};
  }
  Rows heads(const Tensor& u, int64_t b) const { return {floats(u) + b * u.stride(0), u.stride(1)}; }

  // task(b, scratch) for every sequence, with `arrays` of [H, longest] floats of its own.
  template <typename Task>
  void each(int64_t arrays, Task task) const {
    // A share below about 2^18 multiply-adds (10 µs) costs more to hand out than to do.
    const int64_t work = std::max<int64_t>(1, T / std::max<int64_t>(1, B) * H * C * 2 * arrays);
    torch::stable::parallel_for(0, B, std::max<int64_t>(1, (1 << 18) / work), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(arrays * H * longest);
      for (int64_t b = begin; b < end; ++b) task(b, scratch.data());
    });
  }
};

Tensor with_contiguous_rows(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : contiguous(x); }

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& u_, const std::optional<Tensor>& cu_seqlens, int64_t) {
  const Tensor x = with_contiguous_rows(x_), u = with_contiguous_rows(u_);
  const Layout layout(x, u, cu_seqlens);
  const int64_t H = layout.H, C = layout.C;
  Tensor y = new_empty(u, u.sizes()), lse = new_empty(u, {layout.B, H});
  auto *yp = mutable_floats(y), *lsep = mutable_floats(lse);
  layout.each(1, [&](int64_t b, float* S) {
    const int64_t L = layout.length(b);
    const Rows tokens = layout.tokens(x, b);
    dots(tokens, L, layout.heads(u, b), H, C, S);
    if (L) softmax(S, H, L, lsep + b * H);
    else std::fill(lsep + b * H, lsep + (b + 1) * H, -INFINITY);
    const Term term{S, L, 1, tokens, L};
    combine(&term, 1, H, C, yp + b * H * C, C);
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& u_, const Tensor&, const Tensor& lse_, const std::optional<Tensor>& cu_seqlens,
    int64_t) {
  const Tensor dy = with_contiguous_rows(dy_), x = with_contiguous_rows(x_), u = with_contiguous_rows(u_), lse = contiguous(lse_);
  const Layout layout(x, u, cu_seqlens);
  const int64_t H = layout.H, C = layout.C;
  Tensor dx = new_empty(x, x.sizes()), du = new_empty(u, u.sizes());
  auto *dxp = mutable_floats(dx), *dup = mutable_floats(du);
  const auto* lsep = floats(lse);
  layout.each(2, [&](int64_t b, float* S) {
    const int64_t L = layout.length(b);
    const Rows tokens = layout.tokens(x, b), queries = layout.heads(u, b), upstream = layout.heads(dy, b);
    float* dS = S + H * layout.longest;
    dots(tokens, L, queries, H, C, S);
    dots(tokens, L, upstream, H, C, dS);
    softmax_backward(S, dS, H, L, lsep + b * H);
    const Term into_x[] = {{S, 1, L, upstream, H}, {dS, 1, L, queries, H}}, into_u{dS, L, 1, tokens, L};
    combine(into_x, 2, L, C, dxp + layout.ends[b] * C, C);
    combine(&into_u, 1, H, C, dup + b * H * C, C);
  });
  return {dx, du};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("pooling_cpu", TORCH_BOX(&forward));
  m.impl("pooling_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
