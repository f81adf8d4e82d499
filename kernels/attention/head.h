// One head of one sequence of attention on the CPU, fp32.
//
// Queries go in blocks of at most 32, transposed into the lanes: S[j][i] = k_j · q_i has the keys in rows and the queries in lanes, so
// that maxima, sums and the softmax's gradient run down the rows with no sum across lanes, and K and V are read in place. Every
// product is one micro-kernel, `product`, whose left operand is broadcast (hence may have any strides) and whose right one is vectors.
#pragma once

#include "vec.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace clipfast::head {

constexpr int64_t kLanes = 16;  // queries come in whole AVX-512 registers
constexpr int64_t kBlock = 32;  // queries of a block

struct Matrix {  // a broadcast operand: element (r, c) at p[r·row + c·column]
  const float* p;
  int64_t row, column;
};

// C[m, wn] = A[m, depth] · B[depth, wn], or += where `add`, the sums in registers.
template <int w, int m, int n>
CLIPFAST_INLINE void tile(Matrix A, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t depth, bool add) {
  typename Vector<w>::Floats sum[m][n] = {};
  if (add)
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) sum[i][j] = at<w>(C + i * ldc + j * w);
  for (int64_t d = 0; d < depth; ++d)
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) sum[i][j] += A.p[i * A.row + d * A.column] * at<w>(B + d * ldb + j * w);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) at<w>(C + i * ldc + j * w) = sum[i][j];
}

// `count` rows of wn columns in tiles of at most `most` rows.
template <int w, int n, int most>
CLIPFAST_INLINE void columns(Matrix A, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t count, int64_t depth, bool add) {
  while (count > 0) {
    // Even shares: 9 rows are 5 + 4, not 8 + 1, which would wait on the latency of one chain.
    const int64_t tiles = (count + most - 1) / most, m = (count + tiles - 1) / tiles;
    switch (m) {
      case 1: tile<w, 1, n>(A, B, ldb, C, ldc, depth, add); break;
      case 2: tile<w, 2, n>(A, B, ldb, C, ldc, depth, add); break;
      case 3: tile<w, 3, n>(A, B, ldb, C, ldc, depth, add); break;
      case 4: tile<w, 4, n>(A, B, ldb, C, ldc, depth, add); break;
      case 5: tile<w, 5, n>(A, B, ldb, C, ldc, depth, add); break;
      case 6: tile<w, 6, n>(A, B, ldb, C, ldc, depth, add); break;
      case 7: tile<w, std::min(7, most), n>(A, B, ldb, C, ldc, depth, add); break;
      default: tile<w, most, n>(A, B, ldb, C, ldc, depth, add);
    }
    A.p += m * A.row;
    C += m * ldc;
    count -= m;
  }
}

template <int w, int n, int most>
CLIPFAST_INLINE void product_of(
    Matrix A, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t count, int64_t width, int64_t depth, bool add) {
  int64_t c = 0;
  for (; c + n * w <= width; c += n * w) columns<w, n, most>(A, B + c, ldb, C + c, ldc, count, depth, add);
  if (c < width) columns<w, kLanes / w, most>(A, B + c, ldb, C + c, ldc, count, depth, add);
}

// C[count, width] = A[count, depth] · B[depth, width], or += where `add`; width a multiple of 16. In registers are the sums and
// three operands at most: 8 × 2 and in NEON 6 × 4 sums of 32 registers, 6 × 2 in AVX2's 16.
constexpr int kBeside = kLanes / kNarrowFloats;
constexpr auto product = kernel<product_of<kWideFloats, 32 / kWideFloats, 8>, product_of<kNarrowFloats, kBeside, 6>>;

// to[c][i] = factor · from[i][c] for i < count, and 0 for the other lanes.
CLIPFAST_INLINE void transposed(const float* from, int64_t stride, int64_t count, int64_t K, int64_t lanes, float factor, float* to) {
  constexpr int w = kSquare;
  static constexpr float zeros[w] = {};
  for (int64_t i = 0; i < lanes; i += w)
    for (int64_t c = 0; c < K; c += w) {
      Vector<w>::Floats r[w];
#pragma GCC unroll 8
      for (int64_t l = 0; l < w; ++l) r[l] = factor * at<w>(i + l < count ? from + (i + l) * stride + c : zeros);
      turn(r);
#pragma GCC unroll 8
      for (int64_t l = 0; l < w; ++l) at<w>(to + (c + l) * lanes + i) = r[l];
    }
}
constexpr auto transpose = kernel<transposed>;

template <int w>
CLIPFAST_INLINE void exponentiate(float* p) {
#pragma omp simd
  for (int l = 0; l < w; ++l) p[l] = exp_fp32(p[l]);
}

// Lane l is query first + l: it sees the keys up to itself.
template <int w>
CLIPFAST_INLINE void hide_later(float* s, int64_t key, int64_t first) {
  static constexpr int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto& lane = *reinterpret_cast<const typename Vector<w>::Flags*>(lanes);
  const typename Vector<w>::Floats hidden = typename Vector<w>::Floats{} - INFINITY;
  at<w>(s) = lane >= static_cast<int32_t>(key - first) ? at<w>(s) : hidden;
}

template <int w>
CLIPFAST_INLINE void softmax_of(float* S, int64_t keys, int64_t lanes, bool causal, int64_t first, float* maxima, float* sums) {
  for (int64_t l = 0; l < lanes; l += w) {
    typename Vector<w>::Floats top = typename Vector<w>::Floats{} - INFINITY, sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      float* s = S + j * lanes + l;
      if (causal && j > first + l) hide_later<w>(s, j, first + l);
      top = at<w>(s) > top ? at<w>(s) : top;  // a NaN is passed over here and comes out of the exponential
    }
    for (int64_t j = 0; j < keys; ++j) {
      float* p = S + j * lanes + l;
      at<w>(p) -= top;
      exponentiate<w>(p);
      sum += at<w>(p);
    }
    const typename Vector<w>::Floats inverse = 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j) at<w>(S + j * lanes + l) *= inverse;
    at<w>(maxima + l) = top;
    at<w>(sums + l) = sum;
  }
}

// S[keys][lanes] -> its softmax over the keys, in place, and what was subtracted and divided by for each lane.
constexpr auto softmax = kernel<softmax_of<kWideFloats>, softmax_of<kNarrowFloats>>;

struct Sequence {  // one head of one sequence
  int64_t L, K;
  bool causal;
  float scale;
};

inline int64_t lanes_of(int64_t count) { return count > kLanes ? kBlock : kLanes; }

struct Rows {  // [L, K] with K contiguous
  const float* p;
  int64_t stride;
};

// Rows that several blocks will read are brought together: far apart, each lies on a memory page of its own.
inline Rows gathered(Rows x, const Sequence& s, float*& scratch) {
  if (s.L <= kBlock) return x;
  float* to = std::exchange(scratch, scratch + s.L * s.K);
  for (int64_t t = 0; t < s.L; ++t) std::copy_n(x.p + t * x.stride, s.K, to + t * s.K);
  return {to, s.K};
}

inline int64_t forward_scratch(int64_t L, int64_t K) { return kBlock * (K + L) + 2 * L * K; }

// q, k, v: rows `stride` apart; out: rows `ldo` apart; lse: [L]; scratch: forward_scratch(L, K) floats.
inline void forward_head(
    const Sequence& s, const float* q, const float* k_, const float* v_, int64_t stride, float* out, int64_t ldo, float* lse,
    float* scratch) {
  float *Q = scratch, *S = Q + kBlock * s.K, maxima[kBlock], sums[kBlock];
  scratch = S + kBlock * s.L;
  const Rows k = gathered({k_, stride}, s, scratch), v = gathered({v_, stride}, s, scratch);
  for (int64_t first = 0; first < s.L; first += kBlock) {
    const int64_t count = std::min(kBlock, s.L - first), lanes = lanes_of(count), keys = s.causal ? first + count : s.L;
    transpose(q + first * stride, stride, count, s.K, lanes, s.scale, Q);
    product({k.p, k.stride, 1}, Q, lanes, S, lanes, keys, lanes, s.K, false);
    softmax(S, keys, lanes, s.causal, first, maxima, sums);
    product({S, 1, lanes}, v.p, v.stride, out + first * ldo, ldo, count, s.K, keys, false);
    for (int64_t i = 0; i < count; ++i) lse[first + i] = maxima[i] + std::log(sums[i]);
  }
}

}  // namespace clipfast::head
