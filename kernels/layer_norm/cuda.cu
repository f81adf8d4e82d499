// Layer norm for NVIDIA GPUs: a warp has a row (two have one of more than 1,024 columns, four one of more than 2,048), every lane up to
// 32 columns of it in vectors of 16 bytes.
//
// Bytes are the floor: forward reads x (and the residual) and writes y (and s), the row waiting in registers between its mean, its
// deviation and its result. Backward keeps its row as it came, in 16 bit, makes the numbers anew behind its one reduction, and adds
// the gradients of gain and bias in registers over the rows of a warp; a second kernel adds the CTAs' parts in order: no atomics,
// equal inputs give equal bits.
//
// An SM of an H200 moves 33 bytes a ns (4.3 TB/s), 19 a cycle. At 768 columns in bf16, with a residual and gains in fp32, a row is 6,144
// bytes, 323 cycles. What it takes, from the SASS for sm_90a, and how much an SM loads at once:
//             instructions of its warp  cycles of 4 schedulers  cycles of L1  rows at work  bytes on their way
//   forward   430                       108                     144           36            110 KB
//   backward  560                       140                     48            16            73 KB
// At 1 µs from a load to its data 16 KB forward and 25 KB backward must be on their way. No warp waits for another. No GPU has run this.
#include "device.cuh"

#include <algorithm>
#include <tuple>

namespace clipfast {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWidest = 4096;

// A lane has up to 8 · kGroups columns. How many CTAs share an SM: of its 65,536 registers a thread has 64 or 80 forward, backward 96
// to 255.
template <class T, int kWarps, int kGroups> struct Row {
  static constexpr int V = Vector<T>::kSize, kVectors = 8 * kGroups / V, kLanes = kWarp * kWarps, kTeams = kThreads / kLanes;
  static constexpr int kWidth = kLanes * 8 * kGroups, kForward = sizeof(T) == 4 ? 6 : 8;
  static constexpr int kBackward = sizeof(T) == 4 ? 2 : kGroups == 2 ? 5 : kGroups * kWarps == 3 ? 4 : 3;
  const int thread = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  __device__ int column(int k) const { return (k * kLanes + thread) * V; }

  // These of a row's vectors, zeros behind its end.
  template <class U> __device__ void load(Packed<U, V> (&to)[kVectors], const U* row, int C) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) to[k] = column(k) < C ? load_packed<V>(row + column(k)) : Packed<U, V>{};
  }

  // Sums over the team, the same bits in all its threads. `turn` is 0 and 1 by turns, so that one barrier serves.
  template <int count> __device__ void sum(float (&x)[count], int turn) const {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
#pragma unroll
      for (int i = 0; i < count; ++i) x[i] += __shfl_xor_sync(~0u, x[i], lanes);
    if constexpr (kWarps > 1) {
      __shared__ float parts[2][kThreads / kWarp][count];
      for (int i = 0; i < count; ++i)
        if (thread % kWarp == 0) parts[turn][threadIdx.x / kWarp][i] = x[i];
#pragma unroll
      for (int i = 0; i < kTeams; ++i)  // barriers named by constants: ptxas reserves these, not all sixteen
        if (i == team) sync_threads(1 + i, kLanes);
      for (int i = 0; i < count; ++i) {
        x[i] = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) x[i] += parts[turn][team * kWarps + warp][i];
      }
    }
  }
};

// [rows, C] in T: x, residual (may be null), y, s (null where residual is); [C] in W: weight, bias; [rows]: mean, rstd. C % 8 == 0.
template <class T, class W> struct Forward {
  const T *x, *residual;
  const W *weight, *bias;
  T *y, *s;
  float *mean, *rstd;
  unsigned rows;  // below 2³¹
  int C;
  float share, eps;  // share: 1 / C
};

template <class T, class W, int kWarps, int kGroups>
__global__ void __launch_bounds__(kThreads, Row<T, kWarps, kGroups>::kForward) forward_kernel(const Forward<T, W> p) {
  using R = Row<T, kWarps, kGroups>;
  const R own;
  const unsigned row = blockIdx.x * R::kTeams + own.team;
  const int64_t at = static_cast<int64_t>(row) * p.C;
  if (row >= p.rows) return;
  Packed<T, R::V> in[R::kVectors], add[R::kVectors];
  own.load(in, p.x + at, p.C);
  if (p.residual) own.load(add, p.residual + at, p.C);
  float x[R::kVectors][R::V], sum[1] = {}, square[1] = {};
#pragma unroll
  for (int k = 0; k < R::kVectors; ++k) {
    in[k].widen(x[k]);
    if (p.residual) {
      float more[R::V];
      add[k].widen(more);
      for (int i = 0; i < R::V; ++i) x[k][i] += more[i];
      in[k] = Packed<T, R::V>(x[k]);
      if (own.column(k) < p.C) in[k].store(p.s + at + own.column(k));
      in[k].widen(x[k]);  // what is normalised is what is returned
    }
    for (int i = 0; i < R::V; ++i) sum[0] += x[k][i];
  }
  own.sum(sum, 0);
  const float centre = sum[0] * p.share;
#pragma unroll
  for (int k = 0; k < R::kVectors; ++k)
    for (int i = 0; i < R::V; ++i) {
      x[k][i] -= centre;
      if (own.column(k) < p.C) square[0] = fmaf(x[k][i], x[k][i], square[0]);
    }
  own.sum(square, 1);
  const float scale = rsqrtf(square[0] * p.share + p.eps);
#pragma unroll
  for (int k = 0; k < R::kVectors; ++k) {
    if (own.column(k) >= p.C) continue;
    float gain[R::V], shift[R::V];
    load_packed<R::V>(p.weight + own.column(k)).widen(gain);
    load_packed<R::V>(p.bias + own.column(k)).widen(shift);
    for (int i = 0; i < R::V; ++i) x[k][i] = fmaf(x[k][i] * scale, gain[i], shift[i]);
    Packed<T, R::V>(x[k]).store(p.y + at + own.column(k));
  }
  if (own.thread == 0) p.mean[row] = centre, p.rstd[row] = scale;
}

// [rows, C] in T: dy, ds (may be null), s, dx; [C] in W: weight; [rows]: mean, rstd; parts: [2, CTAs, C], the gradients of gain and bias
// over the rows of a CTA.
template <class T, class W> struct Backward {
  const T *dy, *ds, *s;
  const W* weight;
  const float *mean, *rstd;
  T* dx;
  float* parts;
  unsigned rows;  // below 2³¹
  int C;
  float share;
  uint32_t zero = 0;  // which the compiler does not know
};

template <class T, class W, int kWarps, int kGroups>
__global__ void __launch_bounds__(kThreads, Row<T, kWarps, kGroups>::kBackward) backward_kernel(const Backward<T, W> p) {
  using R = Row<T, kWarps, kGroups>;
  const R own;
  float sums[2][R::kVectors][R::V] = {};
  Packed<W, R::V> weight[R::kVectors];
  own.load(weight, p.weight, p.C);
  int turn = 0;
  for (unsigned row = blockIdx.x * R::kTeams + own.team; row < p.rows; row += gridDim.x * R::kTeams, turn ^= 1) {
    const int64_t at = static_cast<int64_t>(row) * p.C;
    Packed<T, R::V> up[R::kVectors], in[R::kVectors], add[R::kVectors];
    own.load(up, p.dy + at, p.C);
    own.load(in, p.s + at, p.C);
    if (p.ds) own.load(add, p.ds + at, p.C);
    const float centre = p.mean[row], scale = p.rstd[row];
    float dot[2] = {}, g[R::V], x[R::V], gain[R::V];
#pragma unroll
    for (int k = 0; k < R::kVectors; ++k) {
      up[k].widen(g), in[k].widen(x), weight[k].widen(gain);
      for (int i = 0; i < R::V; ++i) {
        x[i] = (x[i] - centre) * scale;
        sums[0][k][i] = fmaf(g[i], x[i], sums[0][k][i]);
        sums[1][k][i] += g[i];
        dot[0] = fmaf(g[i], gain[i], dot[0]);
        dot[1] = fmaf(g[i] * gain[i], x[i], dot[1]);
      }
    }
    own.sum(dot, turn);
    const float mean = dot[0] * p.share, along = dot[1] * p.share;
#pragma unroll
    for (int k = 0; k < R::kVectors; ++k) {
      up[k].turn(p.zero), in[k].turn(p.zero), weight[k].turn(p.zero);  // or the numbers from above would wait in twice the registers
      up[k].widen(g), in[k].widen(x), weight[k].widen(gain);
      for (int i = 0; i < R::V; ++i) g[i] = (fmaf(g[i], gain[i], -mean) - (x[i] - centre) * scale * along) * scale;
      if (p.ds) {
        add[k].widen(x);
        for (int i = 0; i < R::V; ++i) g[i] += x[i];
      }
      if (own.column(k) < p.C) Packed<T, R::V>(g).store(p.dx + at + own.column(k));
    }
  }
  __shared__ __align__(16) float of_teams[R::kTeams][R::kWidth];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    __syncthreads();  // the sums before have been read
    for (int k = 0; k < R::kVectors; ++k)
      for (int i = 0; i < R::V; ++i) of_teams[own.team][own.column(k) + i] = sums[which][k][i];
    __syncthreads();
    float* const part = p.parts + (static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * p.C;
    for (int c = threadIdx.x; c < p.C; c += kThreads) {
      float total = 0.0f;
      for (int team = 0; team < R::kTeams; ++team) total += of_teams[team][c];
      part[c] = total;
    }
  }
}

// parts: [2, count, C] -> dweight, dbias: [C]. A CTA adds 32 columns of one, each warp every 32nd part.
constexpr int kLines = 32;
template <class W>
__global__ void __launch_bounds__(kLines * kWarp) merge_kernel(const float* parts, W* dweight, W* dbias, int count, int C) {
  __shared__ float sums[kLines][kWarp + 1];
  const int tiles = (C + kWarp - 1) / kWarp, which = blockIdx.x / tiles, first = blockIdx.x % tiles * kWarp;
  const int lane = threadIdx.x % kWarp, line = threadIdx.x / kWarp;
  const float* const from = parts + static_cast<int64_t>(which) * count * C + first + lane;
  float sum = 0.0f;
  if (first + lane < C)
    for (int i = line; i < count; i += kLines) sum += from[static_cast<int64_t>(i) * C];
  sums[line][lane] = sum;
  __syncthreads();
  sum = sums[lane][line];  // from here on the column is the warp's
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0 && first + line < C) (which ? dbias : dweight)[first + line] = narrow<W>(sum);
}

// Calls f with the warps of a row and the groups of eight columns of a lane.
template <class F> void by_width(int C, const F& f) {
  const auto with = [&]<int warps, int groups> { f(std::integral_constant<int, warps>{}, std::integral_constant<int, groups>{}); };
  if (C <= 512) return with.template operator()<1, 2>();
  if (C <= 768) return with.template operator()<1, 3>();
  if (C <= 1024) return with.template operator()<1, 4>();
  if (C <= 1536) return with.template operator()<2, 3>();
  if (C <= 2048) return with.template operator()<2, 4>();
  if (C <= kWidest) return with.template operator()<4, 4>();
  throw std::runtime_error("layer_norm on CUDA: expected at most 4096 channels, got " + std::to_string(C));
}

template <class T, class W> void forward(const Call& call, const Forward<T, W>& p) {
  by_width(p.C, [&](auto warps, auto groups) {
    if (p.rows > 0)
      launch(call, forward_kernel<T, W, warps, groups>, {divide_up(p.rows, Row<T, warps, groups>::kTeams), kThreads}, p);
  });
}

template <class T, class W> void backward(const Call& call, Backward<T, W> p, W* dweight, W* dbias) {
  by_width(p.C, [&](auto warps, auto groups) {
    using R = Row<T, warps, groups>;
    const int64_t ctas = std::min<int64_t>(divide_up(p.rows, R::kTeams), R::kBackward * call.sms);
    p.parts = static_cast<float*>(call.allocate(2 * ctas * p.C * sizeof(float)));
    if (ctas > 0) launch(call, backward_kernel<T, W, warps, groups>, {ctas, kThreads}, p);
    const Shape merge{2 * divide_up(p.C, kWarp), kLines * kWarp};
    launch(call, merge_kernel<W>, merge, p.parts, dweight, dbias, static_cast<int>(ctas), p.C);
  });
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

unsigned rows_of(const Tensor& x, int C) {
  const int64_t rows = x.numel() / C;
  if (rows > INT32_MAX) throw std::runtime_error("layer_norm on CUDA: expected fewer than 2^31 rows");
  return static_cast<unsigned>(rows);
}

// Calls f(T{}, W{}) with the types of activations and gains; gains that are not all like the activations are read in fp32.
template <class F> void by_type(ScalarType x, bool alike, const F& f) {
  switch (x) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Half: return alike ? f(__half{}, __half{}) : f(__half{}, float{});
    case ScalarType::BFloat16: return alike ? f(__nv_bfloat16{}, __nv_bfloat16{}) : f(__nv_bfloat16{}, float{});
    default: throw std::runtime_error("layer_norm on CUDA: expected float32, float16 or bfloat16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const Tensor& bias_, double eps) {
  const Guard guard(x_);
  const Call call = call_on("layer_norm", x_);
  const ScalarType type = x_.scalar_type();
  const bool alike = weight_.scalar_type() == type && bias_.scalar_type() == type;
  const ScalarType gains = alike ? type : ScalarType::Float;
  const Tensor x = vectors_of(x_, type), weight = vectors_of(weight_, gains), bias = vectors_of(bias_, gains);
  const Tensor residual = residual_ ? vectors_of(*residual_, type) : x;
  const int C = static_cast<int>(weight.numel());
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const Tensor y = fresh(x, x.sizes(), type), s = residual_ ? fresh(x, x.sizes(), type) : fresh(x, {0}, type);
  const Tensor mean = fresh(x, leading, ScalarType::Float), rstd = fresh(x, leading, ScalarType::Float);
  by_type(type, alike, [&]<class T, class W>(T, W) {
    forward(call, Forward<T, W>{data<T>(x), residual_ ? data<T>(residual) : nullptr, data<W>(weight), data<W>(bias), data<T>(y),
                                residual_ ? data<T>(s) : nullptr, data<float>(mean), data<float>(rstd), rows_of(x, C), C, 1.0f / C,
                                static_cast<float>(eps)});
  });
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Tensor& dy_, const std::optional<Tensor>& ds_, const Tensor& s_, const Tensor& weight_, const Tensor& mean_,
    const Tensor& rstd_) {
  const Guard guard(dy_);
  const Call call = call_on("layer_norm", dy_);
  const ScalarType type = dy_.scalar_type();
  const bool alike = weight_.scalar_type() == type;
  const ScalarType gains = alike ? type : ScalarType::Float;
  const Tensor dy = vectors_of(dy_, type), s = vectors_of(s_, type), mean = contiguous(mean_), rstd = contiguous(rstd_);
  const Tensor weight = vectors_of(weight_, gains), ds = ds_ ? vectors_of(*ds_, type) : dy;
  const int C = static_cast<int>(weight.numel());
  const Tensor dx = fresh(dy, dy.sizes(), type), dweight = fresh(dy, {C}, gains), dbias = fresh(dy, {C}, gains);
  by_type(type, alike, [&]<class T, class W>(T, W) {
    backward(call, Backward<T, W>{data<T>(dy), ds_ ? data<T>(ds) : nullptr, data<T>(s), data<W>(weight), data<float>(mean),
                                  data<float>(rstd), data<T>(dx), nullptr, rows_of(s, C), C, 1.0f / C},
             data<W>(dweight), data<W>(dbias));
  });
  return {dx, to(dweight, weight_.scalar_type()), to(dbias, weight_.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) {
  m.impl("layer_norm_cuda", TORCH_BOX(&forward_op));
  m.impl("layer_norm_backward_cuda", TORCH_BOX(&backward_op));
}
#endif

}  // namespace
}  // namespace clipfast
