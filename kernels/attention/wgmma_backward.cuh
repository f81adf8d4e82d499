// Backward of attention by products of warpgroups: wgmma.cuh tells how.
#pragma once

#include "wgmma.cuh"

namespace clipfast {
namespace {

// A tile of queries, with q and the gradient of out, or of keys, with k and v, which has S and dP transposed.
template <class T, bool keys> struct Slopes {
  const Tile<true, T> tile;
  uint32_t own[keys ? 2 : 3][4][4], weights[4][4], slopes[4][4];
  float denominators[2], deltas[2];  // of the rows, if these are queries,
  const float *denominator, *delta;  // or of all queries of the head
  Sum of_weights, of_slopes;  // dv; dk or dq

  // What a block adds. Waits for what was begun before; the products of the sums are begun. `last`: behind the end of the sequence no key
  // counts, and no query does, as its weights are zero.
  template <bool last> __device__ void add(float (&into)[2][8][4], int block) {
    auto &s = into[0], &ds = into[1];
    tile.wait(block);
    pin(s), pin(ds);
    mma_fence();
    tile.score(s, own[0], tile.block(block, 0));
    tile.score(ds, own[1], tile.block(block, 1));
    mma_commit();
    mma_wait<0>();
    pin(s), pin(ds), pin(of_slopes.at);
    if (keys) pin(of_weights.at);
    if (block > 0) tile.release(block - 1);

    const int count = last ? tile.count(block) : 4, first = kBlock * block + 2 * (tile.lane & 3);
    each<4>(count, [&](int, int n, int i) {
      const int column = first + 8 * n + i % 2;
      s[n][i] = exp2_fast(fmaf(s[n][i], kExponent, -(keys ? denominator[column] : denominators[i / 2])));
      ds[n][i] = s[n][i] * (ds[n][i] - (keys ? delta[column] : deltas[i / 2]));
      if (last && !keys && column >= tile.length) ds[n][i] = 0.0f;
    });
    as_operand<T, 4>(slopes, ds, count);
    if (keys) as_operand<T, 4>(weights, s, count);
    pin(slopes), pin(of_slopes.at);
    if (keys) pin(weights), pin(of_weights.at);
    tile.template finish<last>(count, [&](int count) {
      if (keys) tile.gather(of_weights, weights, tile.block(block, 1), count);
      tile.gather(of_slopes, slopes, tile.block(block, 0), count);
    });
    if (!last) return;
    pin(of_slopes.at);
    if (keys) pin(of_weights.at);
    tile.release(block);
  }
};

template <class T>
__global__ void __launch_bounds__(384, 1) warpgroups_backward_kernel(
    const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap gradient, const __grid_constant__ CUtensorMap out,
    const Problem<T> p, const float* lse, const Matrix<T> dqkv) {
#if CLIPFAST_HOPPER
  run<true, 232>(&qkv, &gradient, &out, p, [&](Held<true>& held, int group, int warp) {
    const int lane = threadIdx.x & 31, blocks = blocks_of(p.length);
    uint32_t parity = 0;
    each_tile<true>(p, group, [&](Head head, Side side, uint32_t before, int tile) {
      head.warp = 4 * tile + warp, head.lane = lane;
      T* const to = head.of(dqkv, true);
      const uint32_t number = before / blocks / 2, turn = number & 1;  // of the head among the CTA's
      const Tile<true, T> base{held, lane, p.length, before, tile + held.kGroups >= blocks};
      const auto work = [&]<bool keys>(Slopes<T, keys>& own) {
        float even[2][8][4], odd[2][8][4];
        int block = 0;
        for (; block + 2 < blocks; block += 2) own.template add<false>(even, block), own.template add<false>(odd, block + 1);
        if (block + 1 < blocks)
          own.template add<false>(even, block), own.template add<true>(odd, block + 1);
        else
          own.template add<true>(even, block);
        head.store(to + (keys ? p.heads * K : 0), dqkv.pitch, own.of_slopes, kScale, kScale);
        if (keys) head.store(to + 2 * p.heads * K, dqkv.pitch, own.of_weights, 1.0f, 1.0f);
      };
      if (side == Side::kQueries) {
        Slopes<T, false> own{base};
        for (int half = 0; half < 2; ++half)
          own.denominators[half] = head.row(half) < p.length ? lse[head.of_lse(p, head.row(half))] * kLog2E : INFINITY;
        take(held, group, warp, parity, own.own);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = 0.0f, x, y, a, b;
#pragma unroll
          for (int i = half; i < 16; i += 2) {
            unpack<T>(own.own[2][i / 4][i % 4], x, y), unpack<T>(own.own[1][i / 4][i % 4], a, b);
            sum = fmaf(x, a, fmaf(y, b, sum));
          }
          own.deltas[half] = quad_sum(sum);
          const int row = head.row(half);
          if (lane % 4 == 0) held.denominator[turn][row] = own.denominators[half], held.delta[turn][row] = own.deltas[half];
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&held.known[turn]);
        work(own);
      } else {
        Slopes<T, true> own{base};
        own.denominator = held.denominator[turn], own.delta = held.delta[turn];
        take(held, group, warp, parity, own.own);
        barrier_wait(&held.known[turn], number >> 1 & 1);
        work(own);
      }
      parity ^= 1;
    });
  });
#endif
}

template <class T>
void backward_by_warpgroups(
    const Call& call, const Problem<T>& p, const Matrix<const T>& dout, const Matrix<const T>& out, const float* lse,
    const Matrix<T>& dqkv) {
  const Shape shape{std::min<int64_t>(p.pairs, call.sms), 384, 1, sizeof(Held<true>) + 1024};
  const int64_t width = p.heads * K;
  launch(call, warpgroups_backward_kernel<T>, shape, map_of(p, p.qkv, 3 * width), map_of(p, dout, width),
         map_of(p, out, width), p, lse, dqkv);
}

}  // namespace
}  // namespace clipfast
