// The contrastive loss for Hopper: statistics of rows and columns in one sweep of S, gradients through blocks of G in 16 bit.
//
// Statistics: (t, Σ 2^(s·log2 e - t)) for every row and column. A warp takes the largest of its 16 × 256 elements as the t of all, so
// that one exponential an element serves both. Where a sum then comes out below 2⁻⁹⁰, terms that count beside it may have been lost
// below 2⁻¹²⁶, and the warp does its tile again by the maxima themselves. Rows stay in registers; columns are added over the 64 rows
// of a warpgroup and to its own line of parts in memory, 8 bytes a column, 4 lines a slot (11 slots, 0.37 GB at N = 1,048,576).
//
// Gradients: G = 2^(x - t)·(a_i + b_j) with a_i = row_grad_i·2^(t - row_lse_i), b_j alike and t the largest log-sum-exp: again one
// exponential, where all log-sum-exps lie within 80 of each other (55 in nats), else two. `facts_kernel` decides on the device.
#include "similarity.cuh"

#include <tuple>

namespace clipfast {
namespace {

constexpr float kLow = -1e30f;  // in place of -∞, of which differences are NaN

// Over lanes that differ in these bits.
template <int bits> __device__ inline float max_over(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x = bits & bit ? fmaxf(x, __shfl_xor_sync(~0u, x, bit)) : x;
  return x;
}

// (top, sum) and another such pair
__device__ inline void add(float& top, float& sum, float other_top, float other_sum) {
  const float ratio = exp2_fast(-fabsf(top - other_top));
  sum = top >= other_top ? sum + other_sum * ratio : sum * ratio + other_sum;
  top = fmaxf(top, other_top);
}

template <class T> struct Statistics {
  struct Arguments {
    const float* scale;
    float2 *row_parts, *column_parts;  // [parts, rows]; [lines, pitch]: (t, sum)
    float* diagonal;
    int64_t offset, pitch;
    int rows, columns;
  };
  const Arguments& given;
  const Seat& seat;
  float4* const columns;  // [4 warps, kColumns / 2] in shared memory, two columns' (t, sum), and
  float4* const line;     // the same in this warpgroup's line of parts
  const float scale;
  float row_top[2], row_sum[2];
  float4 prior;
  int first;
  bool fresh;

  __device__ Statistics(const Arguments& given, const Seat& seat, float* scratch)
      : given(given), seat(seat), columns(reinterpret_cast<float4*>(scratch)),
        line(reinterpret_cast<float4*>(given.column_parts + ((seat.slot * kCluster + seat.rank) * 2 + seat.group) * given.pitch)),
        scale(*given.scale) {}

  __device__ void start(int block) {
    first = seat.row(block);
    fresh = block == seat.slot;
    for (int h = 0; h < 2; ++h) row_top[h] = kLow, row_sum[h] = 0.0f;
  }

  __device__ void fetch(int column) {  // before the products, which take longer than the memory
    prior = fresh ? make_float4(kLow, 0.0f, kLow, 0.0f) : line[column / 2 + seat.thread()];
  }

  __device__ void tile(float (&s)[128], int column) {
    const int pair = pair_in_tile(first, given.offset, column);
    const bool inner = pair == kColumns && first - seat.lane / 4 + 16 <= given.rows && column + kColumns <= given.columns;
    float factor = scale * kLog2E;  // the maximum needs a scale that is not negative; a warp has one maximum, and so one factor
    if (!__all_sync(~0u, inner && scale >= 0.0f)) {
      factor = kLog2E;
      float own[2] = {};
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        const int h = i / 2 % 2, at = i / 4 * 8 + 2 * (seat.lane % 4) + i % 2;
        const bool inside = first + 8 * h < given.rows && column + at < given.columns;
        const float x = s[i] * scale;
        own[h] = at == pair + 8 * h ? x : own[h];
        s[i] = inside ? x : -INFINITY;
      }
      for (int h = 0; h < 2; ++h)
        if (const int at = pair + 8 * h; at >= 0 && at < kColumns && at / 2 % 4 == seat.lane % 4)
          if (first + 8 * h < given.rows && column + at < given.columns) given.diagonal[first + 8 * h] = own[h];
    }
    float largest[4] = {kLow, kLow, kLow, kLow};  // four chains, as each waits for itself
#pragma unroll
    for (int i = 0; i < 128; ++i) largest[i % 4] = fmaxf(largest[i % 4], s[i]);
    const float top = max_over<31>(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]))) * factor;
    float tops[2] = {top, top}, sums[2] = {0.0f, 0.0f};
    seat.sync_group();  // the scratch of the tile before has been read
    if (!__all_sync(~0u, reduce<false>(s, column, factor, tops, sums))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float own = kLow;
        sums[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; ++i) own = fmaxf(own, s[i / 2 * 4 + 2 * h + i % 2]);
        tops[h] = max_over<3>(own) * factor;
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[h] += exp2_fast(fmaf(s[i / 2 * 4 + 2 * h + i % 2], factor, -tops[h]));
      }
      reduce<true>(s, column, factor, tops, sums);
    }
    for (int h = 0; h < 2; ++h) add(row_top[h], row_sum[h], tops[h], sums[h]);
    seat.sync_group();
    for (int w = 0; w < 4; ++w) {  // two columns a thread: what this line has from earlier rows, then the four warps' in order
      const float4 of_warp = columns[w * kColumns / 2 + seat.thread()];
      add(prior.x, prior.y, of_warp.x, of_warp.y);
      add(prior.z, prior.w, of_warp.z, of_warp.w);
    }
    line[column / 2 + seat.thread()] = prior;
  }

  // Sums of the warp's columns, and of its rows, by the same top, and whether they are surely right; or, `apart`, of its columns by
  // their own maxima, the thread's shares of the rows being there.
  template <bool apart>
  __device__ bool reduce(const float (&s)[128], int column, float factor, const float (&tops)[2], float (&sums)[2]) {
    constexpr float kFaint = 0x1p-90f;  // the least sum that is surely right
    const int left = first - seat.lane / 4 < given.rows ? given.columns - column - 2 * seat.lane : 0;  // columns that count
    bool right = true;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      float x[16], own[2] = {tops[0], tops[0]};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float a = s[32 * part + i / 2 * 4 + i % 2], b = s[32 * part + i / 2 * 4 + i % 2 + 2];
        const float top = apart ? max_over<28>(fmaxf(kLow, fmaxf(a, b))) * factor : tops[0];
        const float upper = exp2_fast(fmaf(a, factor, -top)), lower = exp2_fast(fmaf(b, factor, -top));
        x[i] = upper + lower;
        if (!apart) sums[0] += upper, sums[1] += lower;
        if (apart) own[i % 2] = i / 2 == seat.lane / 4 ? top : own[i % 2];
      }
      spread(x, seat.lane);  // the columns 2·lane and the next of 64
      columns[(seat.warp * kColumns + 64 * part) / 2 + seat.lane] = make_float4(own[0], x[0], own[1], x[1]);
      for (int e = 0; e < 2; ++e) right &= 64 * part + e >= left || !(x[e] < kFaint);
    }
    for (int h = 0; h < 2; ++h) {
      sums[h] = quad_sum(sums[h]);
      right &= first + 8 * h >= given.rows || !(sums[h] < kFaint);
    }
    return right;
  }

  __device__ void finish() {
    for (int h = 0; h < 2; ++h)
      if (const int row = first + 8 * h; seat.lane % 4 == 0 && row < given.rows)
        given.row_parts[static_cast<int64_t>(seat.part) * given.rows + row] = make_float2(row_top[h], row_sum[h]);
  }
};

// parts: [count, pitch], added in order -> top, sum [length]: t in nats, moved by a power of two to within a bit of the log-sum-exp, since the caller
// takes the pair's similarity from it; what rounding it loses (4e-6 near 100) goes into the sum.
__global__ void merge_kernel(const float2* parts, int count, int64_t pitch, int length, float* top, float* sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= length) return;
  float highest = kLow, total = 0.0f;
  for (int p = 0; p < count; ++p) add(highest, total, parts[p * pitch + i].x, parts[p * pitch + i].y);
  int bits = 1;
  if (total > 0.0f && total < INFINITY) total = 2.0f * frexpf(total, &bits);
  const double exact = (static_cast<double>(highest) + (bits - 1)) / kLog2E;
  top[i] = static_cast<float>(exact);
  sum[i] = total * static_cast<float>(1.0 + (exact - top[i]));
}

struct Facts {
  Factors factors;
  float top;  // t
  bool one;   // whether one exponential serves
};

// Of a part of the rows and columns: the largest of the log-sum-exps, of their negatives (infinite where one is not a number), and of
// the gradients' sizes.
constexpr int kFactThreads = 256;
__global__ void __launch_bounds__(kFactThreads) largest_kernel(
    const float* row_lse, const float* col_lse, const float* row_grad, const float* col_grad, const float* diagonal_grad, int n,
    int N, float* parts) {
  __shared__ float warps[3][kFactThreads / 32];
  float largest[3] = {kLow, kLow, 0.0f};
  const auto include = [&](float lse, float grad) {
    largest[0] = fmaxf(largest[0], lse);
    largest[1] = fmaxf(largest[1], lse == lse ? -lse : INFINITY);
    largest[2] = fmaxf(largest[2], fabsf(grad));
  };
  const int first = blockIdx.x * kFactThreads + threadIdx.x, step = gridDim.x * kFactThreads;
  for (int64_t i = first; i < n; i += step) include(row_lse[i], fmaxf(fabsf(row_grad[i]), fabsf(diagonal_grad[i])));
  for (int64_t i = first; i < N; i += step) include(col_lse[i], col_grad[i]);
  for (int k = 0; k < 3; ++k) {
    largest[k] = max_over<31>(largest[k]);
    if (threadIdx.x % 32 == 0) warps[k][threadIdx.x / 32] = largest[k];
  }
  __syncthreads();
  if (threadIdx.x >= 3) return;
  float x = warps[threadIdx.x][0];
  for (const float other : warps[threadIdx.x]) x = fmaxf(x, other);
  parts[3 * blockIdx.x + threadIdx.x] = x;
}

// One warp: the range of the log-sum-exps, and a power of two as unit that brings the largest gradient to 4,096 (a mean's, 1/N, would
// be subnormal in fp16). parts: [count, 3]
__global__ void facts_kernel(const float* parts, int count, Facts* facts) {
  float largest[3] = {kLow, kLow, 0.0f};
  for (int i = threadIdx.x; i < count; i += 32)
    for (int k = 0; k < 3; ++k) largest[k] = fmaxf(largest[k], parts[i * 3 + k]);
  for (float& x : largest) x = max_over<31>(x);
  if (threadIdx.x > 0) return;
  int exponent = 0;
  if (largest[2] > 0.0f && largest[2] < INFINITY) frexpf(largest[2], &exponent);
  *facts = Facts{{ldexpf(1.0f, max(exponent, -100) - 12)}, largest[0] * kLog2E, (largest[0] + largest[1]) * kLog2E <= 80.0f};
}

template <class T> struct Gradient {
  struct Arguments {
    const float *scale, *row_lse, *row_grad, *diagonal_grad, *col_lse, *col_grad;
    const Facts* facts;
    T* G;
    int64_t offset, pitch;
    int rows, columns;
  };
  const Arguments& given;
  const Seat& seat;
  float* const weights;  // [kColumns], and their lse behind
  const float factor, top, inverse;
  const bool one;
  int first;
  float row_weight[2], row_lse[2], col_grad[2], col_lse[2];

  __device__ Gradient(const Arguments& given, const Seat& seat, float* scratch)
      : given(given), seat(seat), weights(scratch), factor(*given.scale * kLog2E), top(given.facts->top),
        inverse(1.0f / given.facts->factors.unit), one(given.facts->one) {}

  // The gradient in units, times 2^(t - lse) where one exponential serves.
  __device__ float weight(float grad, float lse) const { return grad * inverse * (one ? exp2_fast(top - lse) : 1.0f); }

  __device__ void start(int block) {
    first = seat.row(block);
    for (int h = 0; h < 2; ++h) {
      const int row = min(first + 8 * h, given.rows - 1);
      row_lse[h] = given.row_lse[row] * kLog2E;
      row_weight[h] = weight(given.row_grad[row], row_lse[h]);
    }
  }

  __device__ void fetch(int column) {  // nothing is computed of it, or the products would wait
    for (int k = 0; k < 2; ++k) {
      const int at = min(column + seat.thread() + 128 * k, given.columns - 1);
      col_lse[k] = given.col_lse[at];
      col_grad[k] = given.col_grad[at];
    }
  }

  __device__ void tile(float (&s)[128], int column) {
    seat.sync_group();  // the scratch of the tile before has been read
    for (int k = 0; k < 2; ++k) {
      weights[seat.thread() + 128 * k] = weight(col_grad[k], col_lse[k] * kLog2E);
      weights[kColumns + seat.thread() + 128 * k] = col_lse[k] * kLog2E;
    }
    seat.sync_group();
    T* const out = given.G + first * given.pitch + column;
    one ? write<true>(s, out + 8 * (seat.lane % 4)) : write<false>(s, out + 8 * (seat.lane % 4));
    for (int h = 0; h < 2; ++h) {  // p - 1 would cancel: the caller's value goes over what this thread has stored
      const int row = first + 8 * h, pair = pair_in_tile(row, given.offset, column);
      if (row < given.rows && pair >= 0 && pair < kColumns && pair % 32 / 8 == seat.lane % 4)
        out[8 * h * given.pitch + pair] = narrow<T>(given.diagonal_grad[row] * inverse);
    }
  }

  template <bool once> __device__ void write(const float (&s)[128], T* out) const {
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      alignas(16) float w[8], lse[8];
      load(w, weights + 32 * part + 8 * (seat.lane % 4));
      if (!once) load(lse, weights + kColumns + 32 * part + 8 * (seat.lane % 4));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float g[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float x = s[16 * part + i / 2 * 4 + 2 * h + i % 2];
          if constexpr (once)
            g[i] = exp2_fast(fmaf(x, factor, -top)) * (row_weight[h] + w[i]);
          else
            g[i] = row_weight[h] * exp2_fast(fmaf(x, factor, -row_lse[h])) + w[i] * exp2_fast(fmaf(x, factor, -lse[i]));
        }
        store(out + 8 * h * given.pitch + 32 * part, g);
      }
    }
  }

  __device__ void finish() {}
};

template <class T>
void statistics(
    const Call& call, const Problem<T>& p, float* row_top, float* row_sum, float* col_top, float* col_sum, float* diagonal) {
  const Plan plan = make_plan(p.n, p.N, p.D, call.sms);
  const int64_t pitch = int64_t{plan.tiles} * kColumns;
  const int lines = 2 * kCluster * plan.slots, n = static_cast<int>(p.n), N = static_cast<int>(p.N);
  const auto rows = static_cast<float2*>(call.allocate(plan.parts * p.n * sizeof(float2)));
  const auto columns = static_cast<float2*>(call.allocate(lines * pitch * sizeof(float2)));
  sweep<T, Statistics<T>>(call, p, p.N, plan, {p.scale, rows, columns, diagonal, p.offset, pitch, n, N});
  launch(call, merge_kernel, {divide_up(n, 256), 256}, rows, plan.parts, p.n, n, row_top, row_sum);
  launch(call, merge_kernel, {divide_up(N, 256), 256}, columns, lines, pitch, N, col_top, col_sum);
}

template <class T>
void backward(
    const Call& call, const Problem<T>& p, const float* row_lse, const float* col_lse, const float* row_grad, const float* col_grad,
    const float* diagonal_grad, float* image_grad, float* text_grad) {
  const auto facts = static_cast<Facts*>(call.allocate(sizeof(Facts)));
  const int n = static_cast<int>(p.n), N = static_cast<int>(p.N);
  const int count = static_cast<int>(std::min<int64_t>(call.sms, divide_up(std::max(p.n, p.N), kFactThreads)));
  const auto parts = static_cast<float*>(call.allocate(3 * count * sizeof(float)));
  launch(call, largest_kernel, {count, kFactThreads}, row_lse, col_lse, row_grad, col_grad, diagonal_grad, n, N, parts);
  launch(call, facts_kernel, {1, 32}, parts, count, facts);
  const auto fill = [&](const Problem<T>& b, int64_t text_rows, int64_t row, int64_t column, T* G, int64_t pitch) {
    sweep<T, Gradient<T>>(
        call, b, text_rows, make_plan(b.n, b.N, b.D, call.sms),
        {p.scale, row_lse + row, row_grad + row, diagonal_grad + row, col_lse + column, col_grad + column, facts, G, b.offset, pitch,
         static_cast<int>(b.n), static_cast<int>(b.N)});
  };
  gradients(call, p, &facts->factors, image_grad, text_grad, fill);
}

// ---- the tail that knows torch ----
#ifdef CLIPFAST_TORCH

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& image, const Tensor& text, const Tensor& scale, int64_t offset) {
  const Inputs in("contrastive", image, text, scale, offset);
  const Tensor row_top = in.floats(in.n), row_sum = in.floats(in.n), col_top = in.floats(in.N), col_sum = in.floats(in.N),
               diagonal = new_zeros(in.image, {in.n}, ScalarType::Float);
  constexpr auto at = data<float>;
  in.run([&](const auto& p) { statistics(in.call, p, at(row_top), at(row_sum), at(col_top), at(col_sum), at(diagonal)); });
  return {row_top, row_sum, col_top, col_sum, diagonal};
}

std::tuple<Tensor, Tensor> backward_op(
    const Tensor& image, const Tensor& text, const Tensor& scale, int64_t offset, const Tensor& row_lse_, const Tensor& col_lse_,
    const Tensor& row_grad_, const Tensor& col_grad_, const Tensor& diagonal_grad_, bool want_image, bool want_text) {
  const Inputs in("contrastive", image, text, scale, offset);
  const Tensor row_lse = contiguous(row_lse_), col_lse = contiguous(col_lse_), row_grad = contiguous(row_grad_),
               col_grad = contiguous(col_grad_), diagonal_grad = contiguous(diagonal_grad_);
  const Tensor image_grad = in.gradient(want_image ? in.n : 0), text_grad = in.gradient(want_text ? in.N : 0);
  constexpr auto at = data<float>;
  if (want_image || want_text)
    in.run([&](const auto& p) {
      backward(in.call, p, at(row_lse), at(col_lse), at(row_grad), at(col_grad), at(diagonal_grad), wanted(image_grad),
               wanted(text_grad));
    });
  return {image_grad, text_grad};
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CLIPFAST_DEVICE, m) {
  m.impl("contrastive_cuda", TORCH_BOX(&forward_op));
  m.impl("contrastive_backward_cuda", TORCH_BOX(&backward_op));
}
#endif

}  // namespace
}  // namespace clipfast
