// Attention of 129 to 432 tokens, not causal, for NVIDIA GPUs whose CTAs have 227 KB of shared memory, where wgmma.cuh does not take it:
// packed sequences, and GPUs that came after Hopper. A CTA has a head: forward k and v whole in shared memory, backward q and the
// gradient of out beside them; its warps take 16 rows at a time, and the other side in blocks of 64 or 32, of which those of the last
// tile of 16 that lie behind the end are masked: 197 tokens count as 208, 257 as 272.
//
// Forward is the online softmax. Backward has 7 products and no barrier but the first: a warp makes dq of 16 queries over all keys, and
// then dk and dv of 16 keys over all queries, from S and dP transposed, whose registers are the operands of the next products. D comes
// from out. No atomics, all sums in a fixed order: equal inputs give equal bits.
//
// What a head takes at least, in cycles of an SM: 19 bytes of HBM on an H200, 1,290 FMA of mma.sync, 128 bytes of shared memory (every
// warp reads the whole other side for its 16 rows), 16 exponentials each.
//                  HBM      products   shared memory   exponentials
//   197 forward    5,300    4,300      6,200           2,700
//   257 forward    6,900    7,300      10,300          4,600
//   197 backward   10,600   15,000     22,200          5,400
//   257 backward   13,900   25,700     37,300          9,200
// Forward several CTAs share an SM, so that some load while others compute; backward computes longer than it loads. No GPU has run this.
#pragma once

#include "parts.cuh"

// Elsewhere the kernels are empty, and `supports` keeps callers away.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLIPFAST_LARGE_SHARED 0
#else
#define CLIPFAST_LARGE_SHARED 1
#endif

namespace clipfast {
namespace {

constexpr int kLongest = 432;  // tokens, of which backward has four matrices in shared memory

constexpr float kUnit = kScale * kLog2E;  // of a product of q and k, in the exponent of 2

// A warp of the CTA that has one head of one sequence, of up to `most` tokens.
template <int kWarps> struct Team : Head {
  int tile;  // the first of the warp

  template <class T> __device__ Team(const Problem<T>& p, int most) {
    tile = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0), lane = threadIdx.x & 31;
    choose(p, blockIdx.x, most);
  }

  // f() for each 16 rows of this warp's, which `warp` names.
  template <class F> __device__ void each_tile(const F& f) {
    for (warp = tile; warp < tiles(); warp += kWarps) f();
  }
};

// The 16 rows at `from` as operand a of products over their columns; read once, where `scores` reads them for every block.
struct Left {
  uint32_t a[K / 16][4];
  const int first = place<Take::kBTransposed>(0);  // of b's rows; two chunks further bits 5 and 6 differ

  __device__ void load(const char* from) {
#pragma unroll
    for (int d = 0; d < K / 16; ++d) fragment<Take::kA>(a[d], from + place<Take::kA>(2 * d));
  }

  // s [16, 16 · count] = these · bᵀ, b [16 · count, K]
  template <class T, int kTiles> __device__ void scores(float (&s)[2 * kTiles][4], const char* b, int count) const {
#pragma unroll
    for (int i = 0; i < 8 * kTiles; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n < count)
#pragma unroll
        for (int d = 0; d < K / 16; ++d) {
          uint32_t right[4];
          fragment<Take::kBTransposed>(right, b + 16 * n * kRow + (first ^ 32 * d));
          mma_sync<T>(s[2 * n], a[d], right[0], right[1]);
          mma_sync<T>(s[2 * n + 1], a[d], right[2], right[3]);
        }
  }
};

template <class T, int kWarps, int kCtas>
__global__ void __launch_bounds__(32 * kWarps, kCtas)
    long_forward_kernel(const Problem<T> p, int most, const Matrix<T> out, float* lse) {
#if CLIPFAST_LARGE_SHARED
  Team<kWarps> team(p, most);
  const int bytes = 16 * team.tiles() * kRow, own = team.tile * 16 * kRow;
  char *const k = dynamic_shared(), *const v = k + bytes, *const q = v + bytes + own;  // q: 16 rows of this warp
  const T* const from = team.of(p.qkv, p.ends);
  team.each_tile([&] {
    team.load(k, from + p.heads * K, p.qkv.pitch);
    team.load(v, from + 2 * p.heads * K, p.qkv.pitch);
  });
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  Left left;
  team.each_tile([&] {
    __syncwarp();  // the queries before have been read
    team.load(q - 16 * team.warp * kRow, from, p.qkv.pitch);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    left.load(q);
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    Sum y;
    for (int first = 0; first < team.tiles(); first += 4) {
      const int count = min(4, team.tiles() - first), seen = team.length - 16 * first - 2 * (team.lane & 3);
      float s[8][4], peak[2] = {top[0], top[1]}, shrink[2];
      left.scores<T, 4>(s, k + 16 * first * kRow, count);
      each<4>(count, [&](int, int tile, int i) {
        if (8 * tile + i % 2 >= seen) s[tile][i] = -INFINITY;
        peak[i / 2] = fmaxf(peak[i / 2], s[tile][i]);
      });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        peak[half] = quad_max(peak[half]);
        shrink[half] = exp2_fast((top[half] - peak[half]) * kUnit);
        total[half] *= shrink[half], top[half] = peak[half];
      }
      each<4>(count, [&](int, int tile, int i) {
        total[i / 2] += s[tile][i] = exp2_fast(fmaf(s[tile][i], kUnit, top[i / 2] * -kUnit));
      });
      uint32_t weights[4][4];
      as_operand<T, 4>(weights, s, count);
#pragma unroll
      for (int i = 0; i < K / 2; ++i) y.at[i / 4][i % 4] *= shrink[i % 4 / 2];
      y.add<T, 4>(weights, v + 16 * first * kRow, count);
    }
    for (float& x : total) x = quad_sum(x);
    for (int half = 0; half < 2; ++half)
      if (const int row = team.row(half); team.lane % 4 == 0 && row < team.length)
        lse[team.of_lse(p, row)] = top[half] * kScale + logf(total[half]);
    team.store(team.of(out, true), out.pitch, y, reciprocal(total[0]), reciprocal(total[1]));
  });
#endif
}

// lse, out: as forward returns them
template <class T, int kWarps, int kCtas>
__global__ void __launch_bounds__(32 * kWarps, kCtas)
    long_backward_kernel(
        const Problem<T> p, int most, const Matrix<const T> dout, const Matrix<const T> out, const float* lse, const Matrix<T> dqkv) {
#if CLIPFAST_LARGE_SHARED
  Team<kWarps> team(p, most);
  const int bytes = 16 * team.tiles() * kRow;
  char *const k = dynamic_shared(), *const v = k + bytes, *const q = v + bytes, *const g = q + bytes;
  float *const denominator = reinterpret_cast<float*>(g + bytes), *const delta = denominator + 16 * team.tiles();
  const T* const from = team.of(p.qkv, p.ends);
  team.each_tile([&] {
    team.load(k, from + p.heads * K, p.qkv.pitch);
    team.load(v, from + 2 * p.heads * K, p.qkv.pitch);
    team.load(q, from, p.qkv.pitch);
    team.load(g, team.of(dout, p.ends), dout.pitch);
  });
  copy_commit();
  copy_wait<0>();
  team.each_tile([&] {  // log2 of the softmax's denominator, ∞ and so P zero behind the end; D, of what this lane has loaded itself
    if (const int row = 16 * team.warp + team.lane; team.lane < 16)
      denominator[row] = row < team.length ? lse[team.of_lse(p, row)] * kLog2E : INFINITY;
    const T* const results = team.of(out, true);
    for (int row = 16 * team.warp + (team.lane >> 3); row < 16 * team.warp + 16; row += 4) {
      float sum = 0.0f, x[8], y[8];
      if (row < team.length) {
        load_packed<8>(reinterpret_cast<const T*>(g + swizzled(row, team.lane & 7))).widen(x);
        load_packed<8>(results + row * out.pitch + 8 * (team.lane & 7)).widen(y);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
      }
      for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (team.lane % 8 == 0) delta[row] = sum;
    }
  });
  __syncthreads();

  T* const to = team.of(dqkv, true);
  const int tiles = team.tiles();
  for (int job = team.tile; job < 2 * tiles; job += kWarps) {
    team.warp = job < tiles ? job : job - tiles;
    Left one, other;
    if (job < tiles) {  // dk and dv of 16 keys, S and dP transposed
      one.load(k + 16 * team.warp * kRow), other.load(v + 16 * team.warp * kRow);
      Sum dk, dv;
      for (int first = 0; first < tiles; first += 2) {
        const int count = min(2, tiles - first), column = 16 * first + 2 * (team.lane & 3);
        float s[4][4], ds[4][4];
        one.scores<T, 2>(s, q + 16 * first * kRow, count);
        other.scores<T, 2>(ds, g + 16 * first * kRow, count);
        each<2>(count, [&](int, int tile, int i) {
          const int query = column + 8 * tile + i % 2;
          s[tile][i] = exp2_fast(fmaf(s[tile][i], kUnit, -denominator[query]));
          ds[tile][i] = s[tile][i] * (ds[tile][i] - delta[query]);
        });
        uint32_t weights[2][4], slopes[2][4];
        as_operand<T, 2>(weights, s, count);
        as_operand<T, 2>(slopes, ds, count);
        dv.add<T, 2>(weights, g + 16 * first * kRow, count);
        dk.add<T, 2>(slopes, q + 16 * first * kRow, count);
      }
      team.store(to + p.heads * K, dqkv.pitch, dk, kScale, kScale);
      team.store(to + 2 * p.heads * K, dqkv.pitch, dv, 1.0f, 1.0f);
    } else {  // dq of 16 queries
      one.load(q + 16 * team.warp * kRow), other.load(g + 16 * team.warp * kRow);
      const float denominators[2] = {denominator[team.row(0)], denominator[team.row(1)]};
      const float deltas[2] = {delta[team.row(0)], delta[team.row(1)]};
      Sum dq;
      for (int first = 0; first < tiles; first += 2) {
        const int count = min(2, tiles - first), seen = team.length - 16 * first - 2 * (team.lane & 3);
        float s[4][4], ds[4][4];
        one.scores<T, 2>(s, k + 16 * first * kRow, count);
        other.scores<T, 2>(ds, v + 16 * first * kRow, count);
        each<2>(count, [&](int, int tile, int i) {
          const float weight = exp2_fast(fmaf(s[tile][i], kUnit, -denominators[i / 2]));
          ds[tile][i] = 8 * tile + i % 2 >= seen ? 0.0f : weight * (ds[tile][i] - deltas[i / 2]);
        });
        uint32_t slopes[2][4];
        as_operand<T, 2>(slopes, ds, count);
        dq.add<T, 2>(slopes, k + 16 * first * kRow, count);
      }
      team.store(to, dqkv.pitch, dq, kScale, kScale);
    }
  }
#endif
}

// Calls f with the warps of a CTA and the CTAs of an SM for sequences of up to `longest` tokens.
template <class F> void by_long_length(const Call& call, int64_t longest, const F& f) {
  if (longest > kLongest) throw std::runtime_error(std::string(call.op) + " on CUDA: expected sequences of at most 432 tokens");
  f(static_cast<int>(divide_up(longest, 16)));
}

template <class T>
void forward_long(const Call& call, const Problem<T>& p, int64_t longest, const Matrix<T>& out, float* lse) {
  by_long_length(call, longest, [&](int tiles) {
    const auto with = [&]<int warps, int ctas> {
      const Shape shape{p.pairs, 32 * warps, 1, (2 * tiles + warps) * 16 * kRow};
      launch(call, long_forward_kernel<T, warps, ctas>, shape, p, 16 * tiles, out, lse);
    };
    tiles <= 15 ? with.template operator()<5, 3>() : with.template operator()<6, 2>();
  });
}

template <class T>
void backward_long(
    const Call& call, const Problem<T>& p, int64_t longest, const Matrix<const T>& dout, const Matrix<const T>& out, const float* lse,
    const Matrix<T>& dqkv) {
  by_long_length(call, longest, [&](int tiles) {
    const auto with = [&]<int warps, int ctas> {
      const int floats = 2 * 16 * tiles * static_cast<int>(sizeof(float));
      const Shape shape{p.pairs, 32 * warps, 1, 4 * tiles * 16 * kRow + floats};
      launch(call, long_backward_kernel<T, warps, ctas>, shape, p, 16 * tiles, dout, out, lse, dqkv);
    };
    tiles <= 13 ? with.template operator()<6, 2>() : with.template operator()<12, 1>();
  });
}

}  // namespace
}  // namespace clipfast
