// A Linear of 8-bit integers on the CPU, fp32 in and out.
//
// Rows of x are rounded once; then every strip of 32 output channels is multiplied with all rows of a block while it lies in the
// cache. Sums are the same integers by every instruction set: AVX-512 VNNI or AVX-VNNI where the processor has one, which multiply
// unsigned with signed bytes (a weight w goes in as w + 128, and 128 · Σ q comes off), else pairs of 16-bit integers in 32-bit
// sums. Pairs of bytes in 16-bit sums (maddubs) would saturate, or cost a bit of the weights, and multiply no faster on Zen.
#include "vec.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

namespace clipfast {
namespace {

constexpr int64_t kWidth = 32, kDeep = 4;            // a strip of weights: [C / 4][32][4] bytes
constexpr int64_t kStep = kWidth * kDeep;
constexpr int64_t kTall = 12;                        // rows of a tile at most: 12 × 2 sums and 2 operands of 16 lanes in 32 registers
constexpr int64_t kBlock = 256 << 10;                // bytes of the rows of a block, beside a strip in L2
constexpr float kLeast = 1e-36f;                     // spec.LEAST
constexpr int64_t kAhead = 96 * kStep;               // from memory 12 rows read 24 GB/s a core with 12 KB ahead, 17 with 2 KB

using Sixteen = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Eight = int32_t __attribute__((vector_size(32), aligned(4), may_alias));

template <class V, class T>
CLIPFAST_INLINE V& as(T* p) {
  return *reinterpret_cast<V*>(p);
}

// ---- the products of m rows with a strip: sums [m][32]. x: rows of `depth` integers, w: a strip.

#if defined(__x86_64__)
struct Avx512Vnni {
  using Integer = int8_t;
  static constexpr bool kOffset = true;
  static constexpr int kRows = 12;

  template <int m>
  CLIPFAST_INLINE static void tile(const int8_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    Sixteen s[m][2] = {};
    const Sixteen flip = Sixteen{} + static_cast<int32_t>(0x80808080);
    for (int64_t k = 0; k < depth; k += kDeep, w += kStep) {
      const Sixteen left = as<const Sixteen>(w) ^ flip, right = as<const Sixteen>(w + 64) ^ flip;
      __builtin_prefetch(w + kAhead);
      __builtin_prefetch(w + kAhead + 64);
#pragma GCC unroll 12
      for (int i = 0; i < m; ++i) {
        const Sixteen four = Sixteen{} + as<const int32_t>(x + i * depth + k);
        asm("vpdpbusd %2, %1, %0" : "+v"(s[i][0]) : "v"(left), "v"(four));
        asm("vpdpbusd %2, %1, %0" : "+v"(s[i][1]) : "v"(right), "v"(four));
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; ++i) {
      as<Sixteen>(sums + i * kWidth) = s[i][0];
      as<Sixteen>(sums + i * kWidth + 16) = s[i][1];
    }
  }
};

struct AvxVnni {
  using Integer = int8_t;
  static constexpr bool kOffset = true;
  static constexpr int kRows = 6;  // 6 × 2 sums and 3 operands of 8 lanes in 16 registers

  template <int m>
  CLIPFAST_INLINE static void tile(const int8_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    const Eight flip = Eight{} + static_cast<int32_t>(0x80808080);
    for (int64_t j = 0; j < kWidth; j += 16) {
      Eight s[m][2] = {};
      const int8_t* from = w + j * kDeep;
      for (int64_t k = 0; k < depth; k += kDeep, from += kStep) {
        const Eight left = as<const Eight>(from) ^ flip, right = as<const Eight>(from + 32) ^ flip;
#pragma GCC unroll 6
        for (int i = 0; i < m; ++i) {
          const Eight four = Eight{} + as<const int32_t>(x + i * depth + k);
          asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s[i][0]) : "x"(left), "x"(four));
          asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s[i][1]) : "x"(right), "x"(four));
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < m; ++i) {
        as<Eight>(sums + i * kWidth + j) = s[i][0];
        as<Eight>(sums + i * kWidth + j + 8) = s[i][1];
      }
    }
  }
};

struct Avx2 {
  using Integer = int16_t;
  static constexpr bool kOffset = false;
  static constexpr int kRows = 6;

  template <int m>
  CLIPFAST_INLINE static void tile(const int16_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    using Longs = int64_t __attribute__((vector_size(32), aligned(2), may_alias));
    using Bytes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
    // Four bytes of a channel widen to two pairs, whose sums stand side by side until the end.
    for (int64_t j = 0; j < kWidth; j += 8) {
      Eight s[m][2] = {};
      const int8_t* from = w + j * kDeep;
      for (int64_t k = 0; k < depth; k += kDeep, from += kStep) {
        Eight left, right;
        asm("vpmovsxbw %1, %0" : "=x"(left) : "m"(as<const Bytes>(from)));
        asm("vpmovsxbw %1, %0" : "=x"(right) : "m"(as<const Bytes>(from + 16)));
#pragma GCC unroll 6
        for (int i = 0; i < m; ++i) {
          const Longs four = Longs{} + as<const int64_t>(x + i * depth + k);
          Eight a, b;
          asm("vpmaddwd %2, %1, %0" : "=x"(a) : "x"(left), "x"(four));
          asm("vpmaddwd %2, %1, %0" : "=x"(b) : "x"(right), "x"(four));
          s[i][0] += a;
          s[i][1] += b;
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < m; ++i)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) sums[i * kWidth + j + 4 * h + c] = s[i][h][2 * c] + s[i][h][2 * c + 1];
    }
  }
};
#else
struct Plain {
  using Integer = int16_t;
  static constexpr bool kOffset = false;
  static constexpr int kRows = 1;

  template <int m>
  CLIPFAST_INLINE static void tile(const int16_t* x, int64_t depth, const int8_t* w, int32_t* sums) {
    std::fill(sums, sums + kWidth, 0);
    for (int64_t k = 0; k < depth; k += kDeep, w += kStep)
      for (int64_t c = 0; c < kWidth; ++c)
        for (int64_t l = 0; l < kDeep; ++l) sums[c] += static_cast<int32_t>(x[k + l]) * w[c * kDeep + l];
  }
};
#endif

// ---- rows of x as integers

// x: [C] -> q: [depth ≥ C], zeros behind C; the row's scale, NaN where x has NaN or infinity, and the sum of q.
template <class T>
CLIPFAST_INLINE void rounded(const float* x, int64_t C, int64_t depth, T* q, float& scale, int32_t& total) {
  int32_t most = 0;  // the bits of magnitudes are ordered as they are, with infinity and NaN on top
  for (int64_t c = 0; c < C; ++c) most = std::max(most, __builtin_bit_cast(int32_t, x[c]) & 0x7fffffff);
  const float magnitude = __builtin_bit_cast(float, most);
  const bool finite = most < 0x7f800000;
  scale = finite ? magnitude / 127.0f : std::numeric_limits<float>::quiet_NaN();
  total = 0;
  std::fill(q + (finite ? C : 0), q + depth, T{0});
  if (!finite) return;
  const float factor = magnitude >= kLeast ? 127.0f / magnitude : 0.0f;
  int32_t sum = 0;
  for (int64_t c = 0; c < C; ++c) {
    const int32_t v = static_cast<int32_t>(__builtin_rintf(x[c] * factor));
    q[c] = static_cast<T>(v);
    sum += v;
  }
  total = sum;
}

template <class T>
CLIPFAST_INLINE void rounded_rows(const float* x, int64_t C, int64_t depth, T* q, float* scale, int32_t* total, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) rounded(x + r * C, C, depth, q + r * depth, scale[r], total[r]);
}

// ---- sums into numbers

enum class Activation { none, quick, exact };

CLIPFAST_INLINE float quick_gelu(float x) {
  const float z = -1.702f * x;
  return x / (1.0f + exp_to_88(z > 88.0f ? 88.0f : z));
}

// x·Φ(x), with erfc(z) = exp(-z²)·t·P(t) at t = 1 / (1 + 0.37z); P is the polynomial of least relative error, 2e-8.
CLIPFAST_INLINE float exact_gelu(float x) {
  const float z = __builtin_fabsf(x) * 0.70710678f, t = 1.0f / (1.0f + 0.37f * z);
  float p = 0.06192246320695847f;
  p = p * t - 0.3032697284192678f;
  p = p * t + 0.48683458248039835f;
  p = p * t - 0.28530303390693107f;
  p = p * t + 0.31079549086970476f;
  p = p * t + 0.10652329389944255f;
  p = p * t + 0.2062532181016746f;
  p = p * t + 0.20742996063218833f;
  p = p * t + 0.2088137363640595f;
  const float half = 0.5f * x * (p * t * exp_to_88(-z * z));  // of what lies beyond |x|
  return x > 0 ? x - half : half;
}

// What every strip of a call reads.
struct Call {
  const float* bias;       // [N] or null
  const float* scale;      // [N]
  float* y;                // [M, N]
  int64_t N, depth;
  Activation activation;
};

template <Activation activation>
CLIPFAST_INLINE void finished(const int32_t* sums, int32_t less, float by, const Call& call, int64_t j, float* y) {
  const int64_t width = std::min(kWidth, call.N - j);
  for (int64_t c = 0; c < width; ++c) {
    const float x = static_cast<float>(sums[c] - less) * (by * call.scale[j + c]) + (call.bias ? call.bias[j + c] : 0.0f);
    y[c] = activation == Activation::none ? x : activation == Activation::quick ? quick_gelu(x) : exact_gelu(x);
  }
}

template <class Set, int m>
CLIPFAST_INLINE void tile(
    const typename Set::Integer* x, const float* scale, const int32_t* totals, const int8_t* w, const Call& call, int64_t r, int64_t j) {
  alignas(64) int32_t sums[m * kWidth];
  Set::template tile<m>(x, call.depth, w, sums);
  for (int i = 0; i < m; ++i) {
    const int32_t* s = sums + i * kWidth;
    const int32_t less = Set::kOffset ? 128 * totals[i] : 0;
    float* y = call.y + (r + i) * call.N + j;
    switch (call.activation) {
      case Activation::quick: finished<Activation::quick>(s, less, scale[i], call, j, y); break;
      case Activation::exact: finished<Activation::exact>(s, less, scale[i], call, j, y); break;
      default: finished<Activation::none>(s, less, scale[i], call, j, y);
    }
  }
}

// Rows r.. of x with the strip of the channels j..
template <class Set, int m = Set::kRows>
CLIPFAST_INLINE void strip(
    const typename Set::Integer* x, const float* scale, const int32_t* totals, const int8_t* w, const Call& call, int64_t r,
    int64_t rows, int64_t j) {
  for (; rows >= m; rows -= m, r += m, x += m * call.depth, scale += m, totals += m) tile<Set, m>(x, scale, totals, w, call, r, j);
  if constexpr (m > 1) strip<Set, m - 1>(x, scale, totals, w, call, r, rows, j);
}

template <class Set>
constexpr auto strip_of() {
  using Strip = Sets<&strip<Set, Set::kRows>, &strip<Set, Set::kRows>>;
#if defined(__x86_64__)
  if constexpr (Set::kRows == Avx512Vnni::kRows) return &Strip::in_avx512;
  else return &Strip::in_avx2;
#else
  return &Strip::run;
#endif
}

// x: [M, C] -> call.y: [M, N].
template <class Set>
void multiply(const Tensor& x_, const Tensor& weight, int64_t M, int64_t C, const Call& call) {
  using T = typename Set::Integer;
  const int64_t depth = call.depth, strips = weight.size(0);
  const Tensor memory = new_empty(x_, {ceil_div(M * (depth * static_cast<int64_t>(sizeof(T)) + 8), 4)});
  float* const scale = mutable_floats(memory);
  auto* const totals = reinterpret_cast<int32_t*>(scale + M);
  T* const q = reinterpret_cast<T*>(totals + M);
  const float* const x = floats(x_);
  const auto* const w = static_cast<const int8_t*>(weight.data_ptr());
  // A share of less than 2^15 numbers takes as long as giving it away.
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, C)), [&](int64_t begin, int64_t end) {
    kernel<rounded_rows<T>>(x + begin * C, C, depth, q + begin * depth, scale + begin, totals + begin, end - begin);
  });
  const int64_t fit = kBlock / std::max<int64_t>(1, depth * static_cast<int64_t>(sizeof(T))) / kTall * kTall;
  const int64_t R = std::max(4 * kTall, fit), blocks = ceil_div(M, R);
  torch::stable::parallel_for(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r = t / strips * R, s = t % strips;
      strip_of<Set>()(q + r * depth, scale + r, totals + r, w + s * depth * kWidth, call, r, std::min(R, M - r), s * kWidth);
    }
  });
}

Tensor forward(
    const Tensor& x_, const Tensor& weight_, const Tensor& scale_, const std::optional<Tensor>& bias_, std::optional<bool> quick) {
  const Tensor x = contiguous(x_), weight = contiguous(weight_), scale = contiguous(scale_);
  const Tensor bias = bias_ ? contiguous(*bias_) : scale;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t C = sizes.back(), N = scale.numel();
  int64_t M = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) M *= sizes[i];
  sizes.back() = N;
  Tensor y = new_empty(x, sizes);
  if (M == 0 || N == 0) return y;
  const Activation activation = !quick ? Activation::none : *quick ? Activation::quick : Activation::exact;
  const Call call{bias_ ? floats(bias) : nullptr, floats(scale), mutable_floats(y), N, weight.size(1) * kDeep, activation};
#if defined(__x86_64__)
  // A processor with AVX-512 that is held to AVX2 stands for those that have no more.
  static const bool wide_vnni = __builtin_cpu_supports("avx512vnni");
  static const bool narrow_vnni = __builtin_cpu_supports("avxvnni") && !__builtin_cpu_supports("avx512vl");
  if (wide && wide_vnni)
    multiply<Avx512Vnni>(x, weight, M, C, call);
  else if (narrow_vnni)
    multiply<AvxVnni>(x, weight, M, C, call);
  else
    multiply<Avx2>(x, weight, M, C, call);
#else
  multiply<Plain>(x, weight, M, C, call);
#endif
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) { m.impl("int8_linear_cpu", TORCH_BOX(&forward)); }

}  // namespace clipfast
