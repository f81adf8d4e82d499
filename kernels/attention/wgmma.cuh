// Attention of 129 to 640 tokens for Hopper (sm_90a), dense and not causal, by products of warpgroups.
//
// One CTA an SM takes one head after the other. A tile is 64 rows of the head, of which a warpgroup has some matrices as operands in its
// registers; over the other side it goes in blocks of 64, which a warp loads by TMA into a ring, heads ahead of those that multiply. A block
// is given back by the last tile of each warpgroup that reads it, so a head may have no more blocks than the ring has slots.
//   forward, three warpgroups:  64 queries, blocks of keys and values, the online softmax. While a block is at its exponentials, S of the
//                               next and P·V of the one before are in the tensor cores.
//   backward, two warpgroups:   64 queries, blocks of keys and values, for dq; then 64 keys, blocks of queries and gradients, S and dP
//                               transposed, for dk and dv: 7 products and none of the results goes through shared memory. While one
//                               warpgroup is at its exponentials, the other's products and its own of the block before are in the tensor
//                               cores. The first half leaves D, from out, and the log-sum-exps in shared memory for the second.
//
// What a head takes at least, in cycles of an SM: 19 bytes of HBM on an H200, 2,048 FMA of wgmma (tiles and scores 64 wide, depths in steps
// of 16), 128 bytes of shared memory, 16 exponentials each; and the instructions of a scheduler: in the SASS a block has 249 forward, 210
// and 255 in the two halves of backward, a tile about 300 to 400 besides.
//                  HBM      products   shared memory   exponentials   instructions
//   197 forward    5,300    3,700      2,900           3,300          4,700
//   257 forward    6,900    5,900      4,200           5,400          7,100
//   577 forward    15,600   24,600     14,900          23,700         26,600
//   197 backward   10,600   13,200     10,200          6,700          9,000
//   257 backward   13,900   21,000     15,000          10,900         13,600
//   577 backward   31,100   86,700     52,300          47,400         50,400
// Equal inputs give equal bits: no sum depends on who comes first. No GPU has run this yet.
#pragma once

#include "hopper.cuh"
#include "parts.cuh"

namespace clipfast {
namespace {

constexpr int kBlock = 64, kBlockBytes = kBlock * kRow;
constexpr float kExponent = kScale * kLog2E;  // of a product of q and k, in the exponent of 2
constexpr int kMost = 640;                    // tokens

// Which matrices are in blocks and which in a tile: forward, and the two halves of backward.
enum class Side { kForward, kQueries, kKeys };
enum Part { kQ, kK, kV, kGradient, kOut };  // of qkv; of out

template <bool backward> struct Held;
template <> struct alignas(1024) Held<false> {
  static constexpr int kGroups = 3, kSlots = 12, kOwn = 1;
  char blocks[kSlots][2][kBlockBytes], own[kGroups][kOwn][kBlockBytes];
  uint64_t full[kSlots], empty[kSlots], own_full[kGroups], own_empty[kGroups];
};
template <> struct alignas(1024) Held<true> {
  static constexpr int kGroups = 2, kSlots = 10, kOwn = 3;
  char blocks[kSlots][2][kBlockBytes], own[kGroups][kOwn][kBlockBytes];
  float denominator[2][kMost], delta[2][kMost];  // of two heads: log2 of the softmax's, ∞ and P zero behind the end; D
  uint64_t full[kSlots], empty[kSlots], own_full[kGroups], own_empty[kGroups], known[2];  // known: denominator and delta
};

__device__ inline int blocks_of(int length) { return (length + kBlock - 1) / kBlock; }

// f(head, side, blocks before it) for the heads of this CTA, backward for both of their halves.
template <bool backward, class T, class F> __device__ inline void each_half(const Problem<T>& p, const F& f) {
  Head head;
  uint32_t before = 0;
#pragma unroll 1
  for (uint32_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    head.choose(p, pair, p.length);
    f(head, backward ? Side::kQueries : Side::kForward, before);
    before += blocks_of(p.length);
    if constexpr (backward) f(head, Side::kKeys, before), before += blocks_of(p.length);
  }
}

// f(head, side, blocks before it, tile) for the tiles of a warpgroup: of all, in turn.
template <bool backward, class T, class F> __device__ inline void each_tile(const Problem<T>& p, int group, const F& f) {
  int tile = group;
  each_half<backward>(p, [&](const Head& head, Side side, uint32_t before) {
#pragma unroll 1
    for (; tile < blocks_of(p.length); tile += Held<backward>::kGroups) f(head, side, before, tile);
    tile -= blocks_of(p.length);
  });
}

// What a lane that loads knows.
template <bool backward, class T> struct Loader {
  Held<backward>& held;
  const CUtensorMap *qkv, *gradient, *out;
  const Problem<T>& p;

  __device__ void load(char* to, uint64_t* barrier, const Head& head, int part, int row) const {
    const CUtensorMap* const map = part == kOut ? out : part == kGradient ? gradient : qkv;
    load_box_3d(map, to, barrier, ((part <= kV ? part * p.heads : 0) + head.head) * K, row, head.sequence);
  }

  __device__ void blocks() const {
    each_half<backward>(p, [&](const Head& head, Side side, uint32_t at) {
#pragma unroll 1
      for (int row = 0; row < p.length; row += kBlock, ++at) {
        const uint32_t slot = at % held.kSlots;
        barrier_wait(&held.empty[slot], at / held.kSlots & 1 ^ 1);
        barrier_arrive_expecting(&held.full[slot], 2 * kBlockBytes);
        load(held.blocks[slot][0], &held.full[slot], head, side == Side::kKeys ? kQ : kK, row);
        load(held.blocks[slot][1], &held.full[slot], head, side == Side::kKeys ? kGradient : kV, row);
      }
    });
  }

  __device__ void tiles(int group) const {
    uint32_t parity = 1;
    each_tile<backward>(p, group, [&](const Head& head, Side side, uint32_t, int tile) {
      barrier_wait(&held.own_empty[group], parity);
      parity ^= 1;
      const bool keys = side == Side::kKeys;
      barrier_arrive_expecting(&held.own_full[group], (keys ? 2 : held.kOwn) * kBlockBytes);
      load(held.own[group][0], &held.own_full[group], head, keys ? kK : kQ, kBlock * tile);
      if constexpr (backward) {
        load(held.own[group][1], &held.own_full[group], head, keys ? kV : kGradient, kBlock * tile);
        if (!keys) load(held.own[group][2], &held.own_full[group], head, kOut, kBlock * tile);
      }
    });
  }
};

// A tile of a warpgroup, of which each warp has 16 rows: what its warps do with the ring.
template <bool backward, class T> struct Tile {
  Held<backward>& held;
  const int lane, length;
  const uint32_t before;  // blocks of the halves that have been
  const bool leaves;      // no later tile of this warpgroup reads these blocks

  __device__ const char* block(int i, int which) const { return held.blocks[(before + i) % held.kSlots][which]; }
  __device__ void wait(int i) const {
    barrier_wait(&held.full[(before + i) % held.kSlots], (before + i) / held.kSlots & 1);
  }
  __device__ void release(int i) const {
    if (leaves && lane == 0) barrier_arrive(&held.empty[(before + i) % held.kSlots]);
  }
  // Of 16 in a block those that are not all behind the end.
  __device__ int count(int i) const { return min(4, (length - kBlock * i + 15) / 16); }

  // s = a · the transpose of a block's matrix, begun
  __device__ static void score(float (&s)[8][4], const uint32_t (&a)[4][4], const char* rows) {
    const uint64_t b = descriptor(rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_transposed<T>(s, a[i], b + 2 * i, i > 0);  // 32 bytes on, in units of 16
  }
  // Begins what begin(count) begins, of count up to 4; the `last` of a tile in branches of their own, each with its wait.
  template <bool last, class F> __device__ static void finish(int count, const F& begin) {
#pragma unroll
    for (int n = last ? 1 : 4; n <= 4; ++n)
      if (n == count) {
        mma_fence();
        begin(n);
        mma_commit();
        if (last) mma_wait<0>();
      }
  }
  // y += a · its first 16 · count rows, begun
  __device__ static void gather(Sum& y, const uint32_t (&a)[4][4], const char* rows, int count) {
    const uint64_t b = descriptor(rows);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (n < count) mma<T>(y.at, a[n], b + 16 * kRow / 16 * n, 1);
  }
};

// This warp's rows of the warpgroup's matrices, as operands.
template <bool backward, int matrices>
__device__ inline void take(Held<backward>& held, int group, int warp, uint32_t parity, uint32_t (&a)[matrices][4][4]) {
  barrier_wait(&held.own_full[group], parity);
#pragma unroll
  for (int i = 0; i < 4 * matrices; ++i)
    fragment<Take::kA>(a[i / 4][i % 4], held.own[group][i / 4] + 16 * warp * kRow + place<Take::kA>(2 * (i % 4)));
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(&held.own_empty[group]);
#pragma unroll
  for (int i = 0; i < matrices; ++i) pin(a[i]);
}

// The kernels' common frame: a warpgroup that loads, the others at work(held, group, warp).
template <bool backward, int registers, class T, class F>
__device__ inline void run(
    const CUtensorMap* qkv, const CUtensorMap* gradient, const CUtensorMap* out, const Problem<T>& p, const F& work) {
  char* memory = dynamic_shared();
  Held<backward>& held = *reinterpret_cast<Held<backward>*>(memory + (-shared_address(memory) & 1023u));
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < held.kSlots; ++i) barrier_init(&held.full[i], 1), barrier_init(&held.empty[i], 4 * held.kGroups);
    for (int i = 0; i < held.kGroups; ++i) barrier_init(&held.own_full[i], 1), barrier_init(&held.own_empty[i], 4);
    if constexpr (backward)
      for (uint64_t& barrier : held.known) barrier_init(&barrier, 4 * blocks_of(p.length));
    fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    shrink_registers<backward ? 40 : 32>();
    const Loader<backward, T> loader{held, qkv, gradient, out, p};
    if (threadIdx.x == 0) loader.blocks();
    if (threadIdx.x % 32 == 0 && warp > 0 && warp <= held.kGroups) loader.tiles(warp - 1);
  } else {
    grow_registers<registers>();
    work(held, warp / 4 - 1, warp % 4);
  }
}

// ---- forward ----

template <class T> struct Softmax {
  const Tile<false, T> tile;
  uint32_t q[1][4][4], weights[4][4];
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  Sum y;

  __device__ void begin(float (&s)[8][4], int block) const {
    tile.wait(block);
    pin(s);
    mma_fence();
    tile.score(s, q[0], tile.block(block, 0));
    mma_commit();
  }

  // s becomes weights, in units of that of `top`, and y and its total come to be in the same. `last`: behind the end of the sequence
  // no key counts. Waits for all products; those of y that follow are begun.
  template <bool last> __device__ void weigh(float (&s)[8][4], float (&next)[8][4], int block) {
    const int seen = last ? tile.length - kBlock * block - 2 * (tile.lane & 3) : kBlock, count = last ? tile.count(block) : 4;
    float peak[2] = {top[0], top[1]}, shrink[2];
    each<4>(count, [&](int, int n, int i) {
      if (last && 8 * n + i % 2 >= seen) s[n][i] = -INFINITY;
      peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = quad_max(peak[half]);
      shrink[half] = exp2_fast((top[half] - peak[half]) * kExponent);
      total[half] *= shrink[half], top[half] = peak[half];
    }
    each<4>(count, [&](int, int n, int i) {
      total[i / 2] += s[n][i] = exp2_fast(fmaf(s[n][i], kExponent, top[i / 2] * -kExponent));
    });
    mma_wait<0>();
    if (!last) pin(next);
    pin(y.at), pin(s);  // s: its weights take the registers of those before
    if (block > 0) tile.release(block - 1);
    as_operand<T, 4>(weights, s, count);
#pragma unroll
    for (int i = 0; i < K / 2; ++i) y.at[i / 4][i % 4] *= shrink[i % 4 / 2];
    pin(y.at), pin(weights);
    tile.template finish<last>(count, [&](int count) { tile.gather(y, weights, tile.block(block, 1), count); });
    if (!last) return;
    pin(y.at);
    tile.release(block);
  }
};

template <class T>
__global__ void __launch_bounds__(512, 1) warpgroups_forward_kernel(
    const __grid_constant__ CUtensorMap qkv, const Problem<T> p, const Matrix<T> out, float* lse) {
#if CLIPFAST_HOPPER
  run<false, 160>(&qkv, nullptr, nullptr, p, [&](Held<false>& held, int group, int warp) {
    const int lane = threadIdx.x & 31, blocks = blocks_of(p.length);
    uint32_t parity = 0;
    each_tile<false>(p, group, [&](Head head, Side, uint32_t before, int tile) {
      Softmax<T> own{{held, lane, p.length, before, tile + held.kGroups >= blocks}};
      take(held, group, warp, parity, own.q);
      parity ^= 1;
      float even[8][4], odd[8][4];
      int block = 0;
      own.begin(even, 0);
      mma_wait<0>();
      pin(even);
      const auto step = [&](float(&s)[8][4], float(&next)[8][4]) {
        own.begin(next, block + 1);
        own.template weigh<false>(s, next, block++);
      };
      while (block + 2 < blocks) step(even, odd), step(odd, even);
      if (block + 1 < blocks) {
        step(even, odd);
        own.template weigh<true>(odd, odd, block);
      } else {
        own.template weigh<true>(even, even, block);
      }

      head.warp = 4 * tile + warp, head.lane = lane;
      for (float& x : own.total) x = quad_sum(x);
      for (int half = 0; half < 2; ++half)
        if (const int row = head.row(half); lane % 4 == 0 && row < p.length)
          lse[head.of_lse(p, row)] = own.top[half] * kScale + logf(own.total[half]);
      head.store(head.of(out, true), out.pitch, own.y, reciprocal(own.total[0]), reciprocal(own.total[1]));
    });
  });
#endif
}

// Whether TMA takes it: it counts from sequence to sequence in whole tokens.
inline bool even(int64_t sequences, int64_t length, int64_t width, int64_t pitch, int64_t step) {
  return pitch >= width && (sequences == 1 || (step % pitch == 0 && step >= length * pitch));
}

template <class T> bool fits_warpgroups(const Call& call, const Problem<T>& p, const Matrix<const T>* gradient = nullptr) {
  const int64_t sequences = p.pairs / p.heads, width = p.heads * K;
  return call.generation == 9 && !p.ends && !p.causal && p.length > 128 && p.length <= kMost &&
         even(sequences, p.length, 3 * width, p.qkv.pitch, p.qkv.step) &&
         (!gradient || even(sequences, p.length, width, gradient->pitch, gradient->step));
}

template <class T> CUtensorMap map_of(const Problem<T>& p, const Matrix<const T>& m, int64_t width) {
  const int64_t sequences = p.pairs / p.heads, step = sequences > 1 ? m.step : p.length * m.pitch;
  return tensor_map(m.data, {width, p.length, sequences}, {m.pitch, step}, kBlock);
}

template <class T> void forward_by_warpgroups(const Call& call, const Problem<T>& p, const Matrix<T>& out, float* lse) {
  const Shape shape{std::min<int64_t>(p.pairs, call.sms), 512, 1, sizeof(Held<false>) + 1024};
  launch(call, warpgroups_forward_kernel<T>, shape, map_of(p, p.qkv, 3 * p.heads * K), p, out, lse);
}

}  // namespace
}  // namespace clipfast
