// Attention of heads of 64 for NVIDIA GPUs from sm_80 on; longer sequences are in long.cuh and wgmma.cuh. A team of warps, one for each 16 tokens
// (50 tokens: 4, 77: 5), has a head of a sequence whole in shared memory, and whole rows of the softmax in registers.
//
// Bytes are the floor. Forward reads q, k, v and writes out: 4 rows of 128 bytes a token and head. Backward reads q, k, v, dout and writes
// dqkv: 7 rows. It does without out, as a warp has all keys of its queries: D = rowsum(dout · out) is Σ P·dP, of the same roundings as dP.
// An SM's share of 4.3 TB/s (H200) is 33 bytes a ns, so about 33 KB must be on their way at a latency of 1 µs:
//                a head's bytes  heads on an SM  what these load  time a head may take at the floor
//   50 forward   25.6 KB         6               115 KB           4.7 µs
//   77 forward   39.4 KB         5               148 KB           6.0 µs
//   50 backward  44.8 KB         5               128 KB           6.9 µs
//   77 backward  69.0 KB         3               118 KB           6.3 µs
// Counting the instructions that wait for each other, a head takes 1 µs for its loads and 1 (forward) to 3 µs for the rest. So nothing is
// loaded ahead: while some heads compute, others load. No GPU has run this yet.
//
// Backward has 5 products. A warp makes S, dP and dQ of its own queries; then P and dS pass in 16 bit through shared memory, where k and v
// were, and it makes dV = Pᵀ·dout and dK = dSᵀ·q of its own keys. No atomics, all sums in a fixed order: equal inputs give equal bits.
#include "long.cuh"
#include "wgmma_backward.cuh"

#include <optional>
#include <tuple>

namespace clipfast {
namespace {

// Heads of up to 16 · kTiles tokens: how many a CTA has, which makes four warps of short ones, as a GPU starts about one CTA a cycle and
// heads of 12 tokens (6 KB forward) would come at 0.4 a cycle; and how many CTAs share an SM. Each of its four schedulers has registers for
// 16,384 / 32 / registers a thread warps: 8 at 64, 7 at 72, 6 at 80, 5 at 96, 4 at 128. (5 CTAs of 5 warps put 7 on one of them.)
template <int kTiles> struct Plan;
template <> struct Plan<1> { static constexpr int heads = 4, forward = 8, backward = 6; };
template <> struct Plan<2> { static constexpr int heads = 2, forward = 8, backward = 5; };
template <> struct Plan<4> { static constexpr int heads = 1, forward = 6, backward = 5; };
template <> struct Plan<5> { static constexpr int heads = 1, forward = 5, backward = 3; };
template <> struct Plan<8> { static constexpr int heads = 1, forward = 2, backward = 1; };

// A warp of the team that has one head of one sequence.
template <int kTiles> struct Seat : Head {
  static constexpr int kBytes = 16 * kTiles * kRow;  // of a matrix of the head
  int team;

  template <class T> __device__ explicit Seat(const Problem<T>& p) {
    const int number = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0);  // known to be uniform
    team = number / kTiles, warp = number % kTiles, lane = threadIdx.x & 31;
    const uint32_t pair = blockIdx.x * Plan<kTiles>::heads + team;
    if (pair < p.pairs) choose(p, pair, 16 * kTiles);
  }

  __device__ bool idle() const { return 16 * warp >= length; }  // as many warps are not as there are tiles
  // Tiles of keys that these queries see; in the last of them some are hidden.
  __device__ int seen(bool causal) const { return causal ? warp + 1 : tiles(); }
  __device__ bool hidden(bool causal, bool last, int tile, int i) const {
    return 8 * tile + i % 2 > (!last ? 1 << 30 : causal ? row(i / 2) : length - 1) - 2 * (lane & 3);
  }

  // Barriers named by constants: ptxas reserves these, not all sixteen.
  __device__ void sync() const {
#pragma unroll
    for (int i = 0; i < Plan<kTiles>::heads; ++i)
      if (i == team) sync_threads(i, 32 * tiles());
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kTiles * Plan<kTiles>::heads, Plan<kTiles>::forward)
    forward_kernel(const Problem<T> p, const Matrix<T> out, float* lse) {
  const Seat<kTiles> seat(p);
  if (seat.idle()) return;
  char* const q = dynamic_shared() + seat.team * 3 * seat.kBytes;
  char *const k = q + seat.kBytes, *const v = k + seat.kBytes;
  const T* const from = seat.of(p.qkv, p.ends);
  seat.load(q, from, p.qkv.pitch);
  seat.load(k, from + p.heads * K, p.qkv.pitch);
  copy_commit();
  seat.load(v, from + 2 * p.heads * K, p.qkv.pitch);
  copy_commit();
  copy_wait<1>();
  seat.sync();

  const int seen = seat.seen(p.causal);
  float s[2 * kTiles][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  scores<T, kTiles>(s, q + 16 * seat.warp * kRow, k, seen);
  each<kTiles>(seen, [&](int n, int tile, int i) {
    if (seat.hidden(p.causal, n == seen - 1, tile, i)) s[tile][i] = -INFINITY;
    top[i / 2] = fmaxf(top[i / 2], s[tile][i]);
  });
  for (float& x : top) x = quad_max(x);
  each<kTiles>(seen, [&](int, int tile, int i) {
    total[i / 2] += s[tile][i] = exp2_fast(fmaf(s[tile][i], kScale * kLog2E, top[i / 2] * (-kScale * kLog2E)));
  });
  for (float& x : total) x = quad_sum(x);
  uint32_t weights[kTiles][4];
  as_operand<T, kTiles>(weights, s, seen);
  for (int half = 0; half < 2; ++half)
    if (const int row = seat.row(half); seat.lane % 4 == 0 && row < seat.length)
      lse[seat.of_lse(p, row)] = top[half] * kScale + logf(total[half]);

  copy_wait<0>();
  seat.sync();
  Sum y;
  y.add<T>(weights, v, seen);
  seat.store(seat.of(out, true), out.pitch, y, reciprocal(total[0]), reciprocal(total[1]));
}

// lse: as forward returns it
template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kTiles * Plan<kTiles>::heads, Plan<kTiles>::backward)
    backward_kernel(const Problem<T> p, const Matrix<const T> dout, const float* lse, const Matrix<T> dqkv) {
  const Seat<kTiles> seat(p);
  if (seat.idle()) return;
  char* const k = dynamic_shared() + seat.team * 4 * seat.kBytes;
  char *const v = k + seat.kBytes, *const q = v + seat.kBytes, *const g = q + seat.kBytes;
  const T* const from = seat.of(p.qkv, p.ends);
  seat.load(q, from, p.qkv.pitch);
  seat.load(k, from + p.heads * K, p.qkv.pitch);
  copy_commit();
  seat.load(v, from + 2 * p.heads * K, p.qkv.pitch);
  seat.load(g, seat.of(dout, p.ends), dout.pitch);
  copy_commit();
  float denominator[2], delta[2] = {};  // log2 of the softmax's, ∞ and P zero behind the end; D
  for (int half = 0; half < 2; ++half) {
    const int row = seat.row(half);
    denominator[half] = row < seat.length ? lse[seat.of_lse(p, row)] * kLog2E : INFINITY;
  }
  copy_wait<1>();
  seat.sync();

  const int seen = seat.seen(p.causal);
  float s[2 * kTiles][4], ds[2 * kTiles][4];
  scores<T, kTiles>(s, q + 16 * seat.warp * kRow, k, seen);
  each<kTiles>(seen, [&](int n, int tile, int i) {
    const float weight = exp2_fast(fmaf(s[tile][i], kScale * kLog2E, -denominator[i / 2]));
    s[tile][i] = seat.hidden(p.causal, n == seen - 1, tile, i) ? 0.0f : weight;
  });
  copy_wait<0>();
  seat.sync();
  scores<T, kTiles>(ds, g + 16 * seat.warp * kRow, v, seen);
  each<kTiles>(seen, [&](int, int tile, int i) { delta[i / 2] = fmaf(s[tile][i], ds[tile][i], delta[i / 2]); });
  for (float& x : delta) x = quad_sum(x);
  each<kTiles>(seen, [&](int, int tile, int i) { ds[tile][i] = s[tile][i] * (ds[tile][i] - delta[i / 2]); });
  uint32_t weights[kTiles][4], slopes[kTiles][4];
  as_operand<T, kTiles>(weights, s, seen);
  as_operand<T, kTiles>(slopes, ds, seen);

  T* const to = seat.of(dqkv, true);
  {
    Sum dq;
    dq.add<T>(slopes, k, seen);
    seat.store(to, dqkv.pitch, dq, kScale, kScale);
  }

  // [queries, keys] in shared memory: of 64 keys and less a row takes 128 bytes, P replaces k and dS v; of more 256, and P and then dS
  // replace both.
  constexpr bool together = kTiles <= 4;
  constexpr int pitch = together ? kRow : 2 * kRow;
  const auto pass = [&](char* to, const uint32_t(&x)[kTiles][4]) {
    each<kTiles>(seen, [&](int n, int tile, int i) {
      if (tile == 2 * n)
        *reinterpret_cast<uint32_t*>(to + swizzled(seat.row(i % 2), tile + i / 2, pitch) + 4 * (seat.lane & 3)) = x[n][i];
    });
  };
  // This warp's 16 rows of xᵀ · m. Queries of earlier tiles do not see these keys.
  const auto gather = [&](const char* x, const char* m, T* column, float by) {
    Sum sum;
    x += place<Take::kATransposed>(2 * seat.warp, pitch);
    for (int n = p.causal ? seat.warp : 0; n < seat.tiles(); ++n) {
      uint32_t a[4];
      fragment<Take::kATransposed>(a, x + 16 * n * pitch);
      sum.add<T>(a, m + 16 * n * kRow);
    }
    seat.store(column, dqkv.pitch, sum, by, by);
  };
  seat.sync();  // nobody needs k and v any more
  pass(k, weights);
  if constexpr (together) pass(v, slopes);
  seat.sync();
  gather(k, g, to + 2 * p.heads * K, 1.0f);
  if constexpr (!together) {
    seat.sync();
    pass(k, slopes);
    seat.sync();
  }
  gather(together ? v : k, q, to + p.heads * K, kScale);
}

// Calls f with the integral_constant of a head's tiles.
template <class F> void by_length(const Call& call, int64_t longest, int64_t pairs, const F& f) {
  if (pairs > INT32_MAX) throw std::runtime_error(std::string(call.op) + " on CUDA: expected fewer than 2^31 sequences x heads");
  if (longest <= 16) return f(std::integral_constant<int, 1>{});
  if (longest <= 32) return f(std::integral_constant<int, 2>{});
  if (longest <= 64) return f(std::integral_constant<int, 4>{});
  if (longest <= 80) return f(std::integral_constant<int, 5>{});
  if (longest <= 128) return f(std::integral_constant<int, 8>{});
  throw std::runtime_error(std::string(call.op) + " on CUDA: expected causal sequences of at most 128 tokens");
}

template <int kTiles> Shape shape(int64_t pairs, int matrices) {
  constexpr int heads = Plan<kTiles>::heads;
  return {divide_up(pairs, heads), 32 * kTiles * heads, 1, heads * matrices * Seat<kTiles>::kBytes};
}

// out: [tokens, heads · K], lse: [heads, tokens]; `longest`: no sequence is longer.
template <class T> void forward(const Call& call, const Problem<T>& p, int64_t longest, T* out, float* lse) {
  const Matrix<T> to{out, int64_t{p.heads} * K, 0};
  if (fits_warpgroups(call, p)) return forward_by_warpgroups(call, p, to, lse);
  if (longest > 128 && !p.causal) return forward_long(call, p, longest, to, lse);
  by_length(call, longest, p.pairs, [&](auto tiles) {
    launch(call, forward_kernel<T, tiles.value>, shape<tiles.value>(p.pairs, 3), p, to, lse);
  });
}

// dqkv: [tokens, 3 · heads · K]
template <class T>
void backward(
    const Call& call, const Problem<T>& p, int64_t longest, const Matrix<const T>& dout, const Matrix<const T>& out, const float* lse,
    T* dqkv) {
  const Matrix<T> to{dqkv, int64_t{3} * p.heads * K, 0};
  if (fits_warpgroups(call, p, &dout)) return backward_by_warpgroups(call, p, dout, out, lse, to);
  if (longest > 128 && !p.causal) return backward_long(call, p, longest, dout, out, lse, to);
  by_length(call, longest, p.pairs, [&](auto tiles) {
    launch(call, backward_kernel<T, tiles.value>, shape<tiles.value>(p.pairs, 4), p, dout, lse, to);
  });
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

// x itself where a row's chunks of 16 bytes are aligned, and where sequences so long that TMA must take them lie as it wants; else a
// copy that has them so.
Tensor with_aligned_rows(const Tensor& x, int64_t longest = 0) {
  bool fits = x.stride(x.dim() - 1) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < x.dim() - 1; ++i) fits &= x.stride(i) % 8 == 0;
  if (longest > kLongest && x.dim() == 3) fits &= even(x.size(0), x.size(1), x.size(2), x.stride(1), x.stride(0));
  if (fits) return x;
  Tensor copy = new_empty(x, x.sizes());
  copy_(copy, x);
  return copy;
}

template <class T> Matrix<const T> matrix(const Tensor& x) { return {data<T>(x), x.stride(x.dim() - 2), x.stride(0)}; }

struct Inputs {
  torch::stable::accelerator::DeviceGuard guard;
  Call call;
  Tensor qkv;
  std::optional<Tensor> ends;
  int64_t heads, B, L, tokens, longest;
  bool causal;

  Inputs(const Tensor& qkv_, const std::optional<Tensor>& cu_seqlens, int64_t heads, bool causal, int64_t max_length)
      : guard(qkv_.get_device_index()), call(call_on("attention", qkv_)), qkv(with_aligned_rows(qkv_, cu_seqlens ? 0 : qkv_.size(1))),
        heads(heads), causal(causal) {
    if (qkv.size(qkv.dim() - 1) != 3 * K * heads) throw std::runtime_error("attention on CUDA: expected heads of 64 columns");
    if (cu_seqlens) ends = contiguous(*cu_seqlens);
    B = ends ? ends->numel() - 1 : qkv.size(0), L = ends ? 0 : qkv.size(1);
    tokens = ends ? qkv.size(0) : B * L, longest = ends ? max_length : L;
  }

  // Calls f with the problem in the type of the tensors, if there is anything to do.
  template <class F> void run(const F& f) const {
    const auto with = [&](auto t) {
      using T = decltype(t);
      const int* at = ends ? data<int>(*ends) : nullptr;
      if (tokens > 0 && longest > 0)
        f(Problem<T>{matrix<T>(qkv), at, tokens, B * heads, static_cast<int>(heads), static_cast<int>(L), causal});
    };
    if (qkv.scalar_type() == ScalarType::Half) return with(__half{});
    if (qkv.scalar_type() == ScalarType::BFloat16) return with(__nv_bfloat16{});
    throw std::runtime_error("attention on CUDA: expected float16 or bfloat16");
  }
};

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& qkv, const std::optional<Tensor>& cu_seqlens, int64_t heads, bool causal, int64_t max_length) {
  const Inputs in(qkv, cu_seqlens, heads, causal, max_length);
  const int64_t C = heads * K;
  const Tensor out = in.ends ? new_empty(qkv, {in.tokens, C}) : new_empty(qkv, {in.B, in.L, C});
  const Tensor lse = new_empty(qkv, {heads, in.tokens}, ScalarType::Float);
  in.run([&]<class T>(const Problem<T>& p) { forward(in.call, p, in.longest, data<T>(out), data<float>(lse)); });
  return {out, lse};
}

Tensor backward_op(
    const Tensor& dout_, const Tensor& out_, const Tensor& lse_, const Tensor& qkv, const std::optional<Tensor>& cu_seqlens, int64_t heads,
    bool causal, int64_t max_length) {
  const Inputs in(qkv, cu_seqlens, heads, causal, max_length);
  const Tensor dout = with_aligned_rows(dout_, in.L), out = with_aligned_rows(out_), lse = contiguous(lse_);
  const Tensor dqkv = new_empty(qkv, qkv.sizes());
  in.run([&]<class T>(const Problem<T>& p) {
    backward(in.call, p, in.longest, matrix<T>(dout), matrix<T>(out), data<float>(lse), data<T>(dqkv));
  });
  return dqkv;
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) {
  m.impl("attention_cuda", TORCH_BOX(&forward_op));
  m.impl("attention_backward_cuda", TORCH_BOX(&backward_op));
}
#endif

}  // namespace
}  // namespace clipfast
