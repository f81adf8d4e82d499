// The first half of an MLP for Hopper: y = act(x · weightᵀ + bias) in one sweep of the products' tiles (similarity.cuh), of which the
// epilogue makes what otherwise takes a pass: at 50,432 rows, 768 to 3,072 columns, 0.18 ms beside a product of 0.32 ms.
//
// A tile's products take 12,288 cycles at 768 columns, and its epilogue 2,048 for two special functions an element (QuickGELU), 16 a
// cycle; the other warpgroup multiplies meanwhile. What is written, 128 KB a tile with h, is 2 TB/s of all SMs. No GPU has run this.
#include "similarity.cuh"

#include <tuple>

namespace clipfast {
namespace {

// x·σ(1.702x), or x·Φ(x)
template <bool quick> __device__ inline float activation(float x) {
  if constexpr (quick) return x * reciprocal(1.0f + exp2_fast(x * (-1.702f * kLog2E)));
  return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

template <class T, bool quick> struct Activation {
  struct Arguments {
    const float* bias;  // [columns]
    T *h, *y;           // [rows, columns]: before the bias, or null; the result
    int rows, columns;
  };
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
        if (row < given.rows) store(given.y + at, x);
      }
    }
  }

  __device__ void finish() {}
};

// x: [rows, depth], weight: [columns, depth], columns a multiple of those of a tile.
template <class T>
void expand(
    const Call& call, const T* x, const T* weight, const float* bias, int64_t rows, int64_t columns, int64_t depth, bool quick, T* h,
    T* y) {
  const auto ordered = static_cast<T*>(call.allocate(columns * depth * sizeof(T)));
  const int vectors = static_cast<int>(depth / Vector<T>::kSize);
  launch(call, arrange_kernel<T>, {divide_up(columns * vectors, 256), 256}, reinterpret_cast<const Vector<T>*>(weight),
         reinterpret_cast<Vector<T>*>(ordered), static_cast<int>(columns), vectors);
  const Problem<T> p{x, ordered, rows, columns, depth, nullptr, 0};
  const Plan plan = make_plan(rows, columns, depth, call.sms);
  const auto with = [&]<bool quick> {
    sweep<T, Activation<T, quick>>(call, p, columns, plan, {bias, h, y, static_cast<int>(rows), static_cast<int>(columns)});
  };
  quick ? with.template operator()<true>() : with.template operator()<false>();
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

// x: [.., C], weight: [F, C], bias: [F] -> y [.., F], and h alike, or empty where it is not kept
std::tuple<Tensor, Tensor> forward_op(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, bool quick, bool keep) {
  const Guard guard(x_);
  const Call call = call_on("expand", x_);
  const ScalarType type = x_.scalar_type();
  const Tensor x = vectors_of(x_, type), weight = vectors_of(weight_, type), bias = vectors_of(bias_, ScalarType::Float);
  const int64_t columns = weight.size(0), depth = weight.size(1), rows = x.numel() / depth;
  if (columns % kColumns || depth % 8 || rows > INT32_MAX)
    throw std::runtime_error("expand on CUDA: expected fewer than 2^31 rows and multiples of 8 and of 256 columns");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  const Tensor y = fresh(x, sizes, type), h = keep ? fresh(x, sizes, type) : fresh(x, {0}, type);
  const auto with = [&](auto t) {
    using T = decltype(t);
    if (rows > 0)
      expand(call, data<T>(x), data<T>(weight), data<float>(bias), rows, columns, depth, quick, keep ? data<T>(h) : nullptr,
             data<T>(y));
  };
  if (type == ScalarType::Half)
    with(__half{});
  else if (type == ScalarType::BFloat16)
    with(__nv_bfloat16{});
  else
    throw std::runtime_error("expand on CUDA: expected float16 or bfloat16");
  return {y, h};
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) { m.impl("expand_cuda", TORCH_BOX(&forward_op)); }
#endif

}  // namespace
}  // namespace clipfast
