// An MLP for Hopper: forward y = act(x · fc_weightᵀ + bias), backward dh = (dz · proj_weight) ⊙ act'(h + bias) and the sums of its
// columns, each in one sweep of the products' tiles (similarity.cuh), of which the epilogue makes what otherwise takes a pass: at
// 50,432 rows, 768 to 3,072 columns, 0.18 and 0.27 ms beside a product of 0.32 ms.
//
// A tile's products take 12,288 cycles at 768 columns, and its epilogue 2,048 for two special functions an element (QuickGELU), 16 a
// cycle; the other warpgroup multiplies meanwhile. What is written forward, 128 KB a tile with h, is 2 TB/s of all SMs; backward h is
// read, 64 KB a tile, half of it before the products, and the columns are summed as the statistics of the contrastive loss are. No GPU has
// run this.
#include "similarity.cuh"

#include <array>
#include <tuple>

namespace clipfast {
namespace {

// x·σ(1.702x), or x·Φ(x)
template <bool quick> __device__ inline float activation(float x) {
  if constexpr (quick) return x * reciprocal(1.0f + exp2_fast(x * (-1.702f * kLog2E)));
  return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

// and its derivative: with g = σ(1.702x), g + 1.702x·g·(1 - g), or Φ(x) + x·φ(x)
template <bool quick> __device__ inline float slope(float x) {
  if constexpr (quick) {
    const float gate = reciprocal(1.0f + exp2_fast(x * (-1.702f * kLog2E)));
    return fmaf(1.702f * x * gate, 1.0f - gate, gate);
  }
  return fmaf(0.39894228f * x, exp2_fast(x * x * (-0.5f * kLog2E)), fmaf(0.5f, erff(x * 0.70710678f), 0.5f));
}

template <class T> struct Given {
  const float* bias;  // [columns]
  T *h, *out;         // [rows, columns]: the product before the bias, written forward (or null) and read backward; the result
  float* parts;       // backward, [4 · slots, columns]: sums of dh over the rows of a warpgroup
  int rows, columns;
};

// A thread's columns of 32 lie side by side, eight from 8·(lane % 4) on, as the rows of the weight are `arranged`.
template <class T, bool quick> struct Activation {
  using Arguments = Given<T>;
  const Arguments& given;
  const Seat& seat;
  int first;

  __device__ Activation(const Arguments& given, const Seat& seat, float*) : given(given), seat(seat) {}

  __device__ void start(int block) { first = seat.row(block); }
  __device__ void fetch(int) {}

  __device__ void tile(const float (&s)[128], int column) {
    column += 8 * (seat.lane % 4);
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      alignas(16) float bias[8];
      load(bias, given.bias + column + 32 * part);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + 8 * h;
        const int64_t at = static_cast<int64_t>(row) * given.columns + column + 32 * part;
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = s[16 * part + i / 2 * 4 + 2 * h + i % 2];
        if (given.h && row < given.rows) store(given.h + at, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = activation<quick>(x[i] + bias[i]);
        if (row < given.rows) store(given.out + at, x);
      }
    }
  }

  __device__ void finish() {}
};

template <class T, bool quick> struct Derivative {
  using Arguments = Given<T>;
  static constexpr int kAhead = 8;  // of 16 vectors of h, fetched before the products; with 12 some registers spill
  const Arguments& given;
  const Seat& seat;
  float2* const sums;  // [4 warps, kColumns / 2] in shared memory, two columns each, and
  float2* const line;  // the same in this warpgroup's line of parts
  Packed<T, 8> before[16];
  float2 total;
  int first;
  bool fresh;

  __device__ Derivative(const Arguments& given, const Seat& seat, float* scratch)
      : given(given), seat(seat), sums(reinterpret_cast<float2*>(scratch)),
        line(reinterpret_cast<float2*>(
            given.parts + static_cast<int64_t>((seat.slot * kCluster + seat.rank) * 2 + seat.group) * given.columns)) {}

  __device__ void start(int block) {
    first = seat.row(block);
    fresh = block == seat.slot;
  }

  template <int from, int to> __device__ void load_before(int column) {
#pragma unroll
    for (int i = from; i < to; ++i) {
      const int row = min(first + i % 2 * 8, given.rows - 1);  // the products of rows beyond are zero
      before[i] = load_packed<8>(given.h + static_cast<int64_t>(row) * given.columns + column + i / 2 * 32 + 8 * (seat.lane % 4));
    }
  }

  __device__ void fetch(int column) {  // nothing is computed of it, or the products would wait
    load_before<0, kAhead>(column);
    total = fresh ? make_float2(0.0f, 0.0f) : line[column / 2 + seat.thread()];
  }

  __device__ void tile(const float (&s)[128], int column) {
    seat.sync_group();  // the sums of the tile before have been read
#pragma unroll
    for (int part = 0; part < 8; part += 2) {
      if (part == 2) load_before<kAhead, 16>(column);  // into the registers of the products that have been used
      float both[16];  // rows, of 64 columns: the lane's eight of each 32
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = column + 32 * (part + half) + 8 * (seat.lane % 4);
        alignas(16) float bias[8];
        load(bias, given.bias + at);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x[8];
          before[2 * (part + half) + h].widen(x);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            x[i] = s[16 * (part + half) + i / 2 * 4 + 2 * h + i % 2] * slope<quick>(x[i] + bias[i]);
            both[8 * half + i] = h ? both[8 * half + i] + x[i] : x[i];
          }
          if (const int row = first + 8 * h; row < given.rows) store(given.out + static_cast<int64_t>(row) * given.columns + at, x);
        }
      }
      spread(both, seat.lane);  // the pair lane / 4 % 4 of the eight columns in half lane / 16
      sums[seat.warp * kColumns / 2 + 16 * part + seat.lane / 16 * 16 + seat.lane % 4 * 4 + seat.lane / 4 % 4] =
          make_float2(both[0], both[1]);
    }
    seat.sync_group();
    for (int w = 0; w < 4; ++w) {  // what this line has from earlier rows, then the four warps' in order
      const float2 of_warp = sums[w * kColumns / 2 + seat.thread()];
      total.x += of_warp.x, total.y += of_warp.y;
    }
    line[column / 2 + seat.thread()] = total;
  }

  __device__ void finish() {}
};

// parts: [lines, columns] -> sum [columns], in a fixed order; 32 columns a CTA
constexpr int kTeams = 8;
__global__ void __launch_bounds__(32 * kTeams) sum_kernel(const float* parts, int lines, int columns, float* sum) {
  __shared__ float of_team[kTeams][32];
  const int lane = threadIdx.x % 32, team = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float total = 0.0f;
  for (int line = team; line < lines; line += kTeams) total += parts[static_cast<int64_t>(line) * columns + column];
  of_team[team][lane] = total;
  __syncthreads();
  if (team > 0) return;
  for (int i = 1; i < kTeams; ++i) total += of_team[i][lane];
  sum[column] = total;
}

// What the epilogue makes of a · weightᵀ, a: [rows, depth], weight: [columns, depth], columns a multiple of those of a tile.
template <template <class, bool> class Epilogue, class T>
void product(const Call& call, const T* a, const T* weight, int64_t depth, bool quick, const Plan& plan, const Given<T>& given) {
  const auto ordered = static_cast<T*>(call.allocate(given.columns * depth * sizeof(T)));
  const int vectors = static_cast<int>(depth / Vector<T>::kSize);
  launch(call, arrange_kernel<T>, {divide_up(int64_t{given.columns} * vectors, 256), 256}, reinterpret_cast<const Vector<T>*>(weight),
         reinterpret_cast<Vector<T>*>(ordered), given.columns, vectors);
  const Problem<T> p{a, ordered, given.rows, given.columns, depth, nullptr, 0};
  quick ? sweep<T, Epilogue<T, true>>(call, p, given.columns, plan, given)
        : sweep<T, Epilogue<T, false>>(call, p, given.columns, plan, given);
}

template <class T> void forward(const Call& call, const T* x, const T* fc_weight, int64_t depth, bool quick, const Given<T>& given) {
  product<Activation>(call, x, fc_weight, depth, quick, make_plan(given.rows, given.columns, depth, call.sms), given);
}

// turned: [columns, depth], the other Linear's weight transposed
template <class T>
void backward(const Call& call, const T* dz, const T* turned, int64_t depth, bool quick, Given<T> given, float* dbias) {
  const Plan plan = make_plan(given.rows, given.columns, depth, call.sms);
  const int lines = 2 * kCluster * plan.slots;
  given.parts = static_cast<float*>(call.allocate(sizeof(float) * lines * given.columns));
  product<Derivative>(call, dz, turned, depth, quick, plan, given);
  launch(call, sum_kernel, {given.columns / 32, 32 * kTeams}, given.parts, lines, given.columns, dbias);
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

// Calls f with the type of the activations, once sizes are known to fit.
template <class F> void by_type(const Tensor& x, int64_t rows, int64_t columns, int64_t depth, const F& f) {
  if (columns % kColumns || depth % 8 || rows > INT32_MAX)
    throw std::runtime_error("fused_mlp on CUDA: expected fewer than 2^31 rows and multiples of 8 and of 256 columns");
  if (x.scalar_type() == ScalarType::Half) return f(__half{});
  if (x.scalar_type() == ScalarType::BFloat16) return f(__nv_bfloat16{});
  throw std::runtime_error("fused_mlp on CUDA: expected float16 or bfloat16");
}

// torch's own x · weightᵀ + bias
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(std::optional<Tensor>(bias))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x: [.., C], fc_weight: [F, C], fc_bias: [F], proj_weight: [C, F], proj_bias: [C] -> z [.., C], and y, h [.., F], or empty where
// they are not kept
std::tuple<Tensor, Tensor, Tensor> forward_op(
    const Tensor& x_, const Tensor& fc_weight_, const Tensor& fc_bias_, const Tensor& proj_weight, const Tensor& proj_bias, bool quick,
    bool keep) {
  const Guard guard(x_);
  const Call call = call_on("fused_mlp", x_);
  const ScalarType type = x_.scalar_type();
  const Tensor x = vectors_of(x_, type), fc_weight = vectors_of(fc_weight_, type), bias = vectors_of(fc_bias_, ScalarType::Float);
  const int64_t columns = fc_weight.size(0), depth = fc_weight.size(1), rows = x.numel() / depth;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  const Tensor y = fresh(x, sizes, type), nothing = fresh(x, {0}, type), h = keep ? fresh(x, sizes, type) : nothing;
  by_type(x, rows, columns, depth, [&]<class T>(T) {
    if (rows > 0)
      forward(call, data<T>(x), data<T>(fc_weight), depth, quick,
              Given<T>{data<float>(bias), keep ? data<T>(h) : nullptr, data<T>(y), nullptr, static_cast<int>(rows),
                       static_cast<int>(columns)});
  });
  return {linear(y, proj_weight, proj_bias), keep ? y : fresh(x, {0}, type), h};
}

// dz: [.., C], proj_weight: [C, F], h: [.., F], fc_bias: [F] -> dh [.., F], dbias [F]
std::tuple<Tensor, Tensor> backward_op(
    const Tensor& dz_, const Tensor& proj_weight, const Tensor& h_, const Tensor& fc_bias, bool quick) {
  const Guard guard(dz_);
  const Call call = call_on("fused_mlp", dz_);
  const ScalarType type = dz_.scalar_type();
  const Tensor dz = vectors_of(dz_, type), turned = vectors_of(transpose(proj_weight, 0, 1), type), h = vectors_of(h_, type);
  const Tensor bias = vectors_of(fc_bias, ScalarType::Float);
  const int64_t columns = turned.size(0), depth = turned.size(1), rows = dz.numel() / depth;
  const Tensor dh = fresh(h, h.sizes(), type);
  Tensor dbias = fresh(h, {columns}, ScalarType::Float);
  if (rows == 0) zero_(dbias);
  by_type(dz, rows, columns, depth, [&]<class T>(T) {
    if (rows > 0)
      backward(call, data<T>(dz), data<T>(turned), depth, quick,
               Given<T>{data<float>(bias), data<T>(h), data<T>(dh), nullptr, static_cast<int>(rows), static_cast<int>(columns)},
               data<float>(dbias));
  });
  return {dh, to(dbias, fc_bias.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) {
  m.impl("fused_mlp_cuda", TORCH_BOX(&forward_op));
  m.impl("fused_mlp_backward_cuda", TORCH_BOX(&backward_op));
}
#endif

}  // namespace
}  // namespace clipfast
