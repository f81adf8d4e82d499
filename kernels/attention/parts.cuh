// What the kernels of attention are made of: 16 × 16 elements between shared memory and the tensor cores of sm_80, rows of a head.
#pragma once

#include "device.cuh"

namespace clipfast {
namespace {

constexpr int K = 64, kRow = 2 * K;  // columns of a head, and their bytes
constexpr float kScale = 0.125f;     // 1/√K

// [.., heads · K] or [.., 3 · heads · K]: `pitch` elements from token to token, `step` from sequence to sequence where they are dense.
template <class T> struct Matrix {
  T* data;
  int64_t pitch, step;
};

template <class T> struct Problem {
  Matrix<const T> qkv;
  const int* ends;        // cu_seqlens; null: dense, `length` tokens each
  int64_t tokens, pairs;  // of all sequences; sequences · heads; both below 2³¹
  int heads, length;
  bool causal;
};

// Row-major in shared memory, the chunks of 16 bytes of a row exchanged within eight: the same chunk of eight rows, which ldmatrix reads
// and `pass` writes at once, lies in different banks.
__device__ inline int swizzled(int row, int chunk, int pitch = kRow) { return row * pitch + (chunk ^ (row & 7)) * 16; }

// What 16 × 16 elements become of a product: a or b of a·b, as they stand or transposed.
enum class Take { kA, kATransposed, kB, kBTransposed };

// Where this lane's row of 16 bytes is, of those from a multiple of 16 rows and of 2 chunks on. A lane names a row of one of four 8 × 8
// matrices, which become, in this order, a's registers 0 to 3, or registers 0 and 1 of b for its first and then its second eight columns
// (PTX ISA, fragments of mma.m16n8k16).
template <Take take> __device__ inline int place(int chunk, int pitch = kRow) {
  const int lane = threadIdx.x & 31;
  if constexpr (take == Take::kA || take == Take::kB) return swizzled(lane & 15, chunk + (lane >> 4), pitch);
  return swizzled((lane >> 4) * 8 + (lane & 7), chunk + (lane >> 3 & 1), pitch);
}

template <Take take> __device__ inline void fragment(uint32_t (&r)[4], const char* at) {
  if constexpr (take == Take::kA || take == Take::kBTransposed)
    load_matrices(r, at);
  else
    load_matrices_transposed(r, at);
}

// s [16, 16 · seen] = a [16, K] · bᵀ, b [16 · seen, K]. A loop over k: unrolled, its addresses cost registers.
template <class T, int kTiles> __device__ inline void scores(float (&s)[2 * kTiles][4], const char* a, const char* b, int seen) {
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < K / 8; k += 2) {
    uint32_t left[4], right[4];
    fragment<Take::kA>(left, a + place<Take::kA>(k));
    const char* const from = b + place<Take::kBTransposed>(k);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n < seen) {
        fragment<Take::kBTransposed>(right, from + 16 * n * kRow);
        mma_sync<T>(s[2 * n], left, right[0], right[1]);
        mma_sync<T>(s[2 * n + 1], left, right[2], right[3]);
      }
  }
}

// [16, K] in the registers of a warp.
struct Sum {
  float at[K / 8][4] = {};
  int places[K / 16];

  __device__ Sum() {
#pragma unroll
    for (int d = 0; d < K / 16; ++d) places[d] = place<Take::kB>(2 * d);
  }

  // += a [16, 16] · the 16 rows from `rows`
  template <class T> __device__ void add(const uint32_t (&a)[4], const char* rows) {
#pragma unroll
    for (int d = 0; d < K / 16; ++d) {
      uint32_t b[4];
      fragment<Take::kB>(b, rows + places[d]);
      mma_sync<T>(at[2 * d], a, b[0], b[1]);
      mma_sync<T>(at[2 * d + 1], a, b[2], b[3]);
    }
  }

  // += a [16, 16 · seen] · m
  template <class T, int kTiles> __device__ void add(const uint32_t (&a)[kTiles][4], const char* m, int seen) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n == 0 || n < seen) add<T>(a[n], m + 16 * n * kRow);
  }
};

// f(n, tile, i) for the registers of the 16 × 8 results 2·n and 2·n + 1, n below `seen`.
template <int kTiles, class F> __device__ inline void each(int seen, const F& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    if (n < seen)
#pragma unroll
      for (int j = 0; j < 8; ++j) f(n, 2 * n + j / 4, j % 4);
}

// Results as the operand a of the next product.
template <class T, int kTiles> __device__ inline void as_operand(uint32_t (&a)[kTiles][4], const float (&s)[2 * kTiles][4], int seen) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    if (n < seen)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[n][i] = pack<T>(s[2 * n + i / 2][i % 2 * 2], s[2 * n + i / 2][i % 2 * 2 + 1]);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The j-th value of lane i of four becomes the i-th of lane j.
__device__ inline void exchange(uint32_t& even, uint32_t& odd, bool second, int lanes) {
  const uint32_t got = __shfl_xor_sync(~0u, second ? even : odd, lanes);
  (second ? even : odd) = got;
}
__device__ inline void transpose_in_quad(uint32_t (&r)[4], int lane) {
  exchange(r[0], r[1], lane & 1, 1), exchange(r[2], r[3], lane & 1, 1);
  exchange(r[0], r[2], lane & 2, 2), exchange(r[1], r[3], lane & 2, 2);
}

// One head of one sequence, as a warp sees it that has 16 of its rows.
struct Head {
  int warp, lane, head, sequence, start, length = 0;  // warp: which 16 rows; start: the sequence's first token among all

  // The pair-th of all sequences' heads; of longer ones, against the caller's word, the first `most` tokens.
  template <class T> __device__ void choose(const Problem<T>& p, uint32_t pair, int most) {
    const uint32_t heads = p.heads;
    head = pair % heads, sequence = pair / heads;
    start = p.ends ? p.ends[sequence] : sequence * p.length;
    length = min(p.ends ? p.ends[sequence + 1] - start : p.length, most);
  }

  __device__ int tiles() const { return (length + 15) >> 4; }
  __device__ int row(int half) const { return 16 * warp + 8 * half + (lane >> 2); }  // of registers 2·half, 2·half + 1 of results
  template <class T> __device__ int64_t of_lse(const Problem<T>& p, int row) const { return head * p.tokens + start + row; }
  template <class T> __device__ T* of(const Matrix<T>& m, bool packed) const {
    return m.data + (packed ? start * m.pitch : sequence * m.step) + head * K;
  }

  // This warp's 16 rows, each by eight lanes. Behind the sequence's end zeros: 0 · NaN is NaN.
  template <class T> __device__ void load(char* to, const T* from, int64_t pitch) const {
    const int first = 16 * warp + (lane >> 3), chunk = lane & 7;
    from += first * pitch + 8 * chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i, from += 4 * pitch)
      copy_async(to + swizzled(first + 4 * i, chunk), from, first + 4 * i < length ? 16 : 0);
  }

  // This warp's 16 rows, times a factor of the row: 16 bytes a lane, 64 of a row at once.
  template <class T> __device__ void store(T* to, int64_t pitch, const Sum& sum, float upper, float lower) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int d = 0; d < K / 8; d += 4) {
        const float by = half ? lower : upper;
        Vector<uint32_t> v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.at[i] = pack<T>(sum.at[d + i][2 * half] * by, sum.at[d + i][2 * half + 1] * by);
        transpose_in_quad(v.at, lane);
        if (row(half) < length) *reinterpret_cast<Vector<uint32_t>*>(to + row(half) * pitch + 8 * (d + (lane & 3))) = v;
      }
  }
};

}  // namespace
}  // namespace clipfast
