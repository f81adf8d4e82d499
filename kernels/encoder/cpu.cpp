// Residual attention blocks on the CPU for inference, in one parallel region: fp32, with weights of fp32 or of 8-bit integers.
//
// A few rows (a text of 12 tokens) are multiplied with weights that come from memory: 12 layers of 512 channels are 151 MB, which
// two cores read in 3 ms and multiply in 2 to 4. So weights lie in strips of 32 output channels, read from the first byte to the
// last, each by one thread, while the rows stay in L1 and L2; and between two products nothing is allocated or called.
#include "attention/head.h"
#include "crew.h"
#include "int8_linear/strip.h"
#include "layer_norm/rows.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

namespace clipfast {
namespace {

constexpr int64_t kChunk = 128;         // input channels at a time: 16 KB of a strip, which stay in L1 for all tiles of rows
constexpr int64_t kBlock = 256 << 10;   // bytes of the rows of a block, beside a strip in L2
constexpr int64_t kLeast = 64, kMost = 96;  // rows of a block
constexpr int64_t kShare = 4;           // tasks of a stage for each thread, so that one that is displaced keeps few
constexpr int64_t kFew = 4;             // rows of a task that normalises or rounds

// ---- fp32: rows with a strip of weights [C][32]

// sums[m][32] (+)= x[m, depth] · w[depth][32], while it asks for what lies from `next` on, `step` bytes at a time.
template <int w, int n, int m>
CLIPFAST_INLINE void tile(
    const float* x, int64_t C, const float* weights, int64_t depth, float* sums, bool add, const char* next, int64_t step) {
  using Floats = typename Vector<w>::Floats;
  for (int64_t j = 0; j < kStrip; j += n * w) {
    Floats s[m][n] = {};
    const float* b = weights + j;
    for (int64_t k = 0; k < depth; ++k, b += kStrip, next += step) {
      __builtin_prefetch(next);
      if constexpr (n * w == kStrip) __builtin_prefetch(next + step / 2);
#pragma GCC unroll 12
      for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
        for (int l = 0; l < n; ++l) s[i][l] += x[i * C + k] * at<w>(b + l * w);
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < n; ++l) {
        float* const to = sums + i * kStrip + j + l * w;
        at<w>(to) = add ? at<w>(to) + s[i][l] : s[i][l];
      }
  }
}

template <int w, int n, int m>
CLIPFAST_INLINE void tile_of(
    int64_t rows, const float* x, int64_t C, const float* weights, int64_t depth, float* sums, bool add, const char* next, int64_t step) {
  if constexpr (m > 1)
    if (rows < m) return tile_of<w, n, m - 1>(rows, x, C, weights, depth, sums, add, next, step);
  tile<w, n, m>(x, C, weights, depth, sums, add, next, step);
}

// Rows r.. of x [M, C] with the channels j..j + 31. In registers are the sums and three operands at most: 12 × 2 and in NEON 6 × 4
// sums of 32 registers, 6 × 2 in AVX2's 16.
template <int w, int n, int most>
CLIPFAST_INLINE void strip(const float* x, int64_t C, const float* weights, const Output& out, int64_t r, int64_t rows, int64_t j) {
  alignas(64) float sums[kMost * kStrip];
  for (int64_t k = 0; k < C; k += kChunk) {
    const int64_t depth = std::min(kChunk, C - k), tiles = ceil_div(rows, most), passes = tiles * (kStrip / (n * w));
    const float* const now = weights + k * kStrip;
    // Each pass asks for its share of the next chunk: memory is never idle, nor asked for more than it gives.
    const int64_t step = kStrip * 4 / passes;
    const char* next = reinterpret_cast<const char*>(now + kChunk * kStrip);
    for (int64_t t = 0, i = 0, m; t < tiles; ++t, i += m, next += depth * step * (kStrip / (n * w))) {
      m = ceil_div(rows - i, tiles - t);  // even shares
      tile_of<w, n, most>(m, x + (r + i) * C + k, C, now, depth, sums + i * kStrip, k > 0, next, step);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* const s = sums + i * kStrip;
    put(out, r + i, j, [&](int64_t c) __attribute__((always_inline)) { return s[c]; });
  }
}
constexpr auto strip_of_floats = kernel<strip<kWideFloats, 32 / kWideFloats, 12>, strip<kNarrowFloats, 16 / kNarrowFloats, 6>>;

// ---- what a product reads

struct Weight {
  const void* strips;
  const float *scale, *bias;  // [N]; scale of 8-bit weights alone
  int64_t C, N;
};

struct Floats {
  static constexpr bool kRounds = false;
  static int64_t bytes(int64_t, int64_t) { return 0; }
  Floats(void*, int64_t, int64_t) {}
  void take(const float*, int64_t, int64_t, int64_t) const {}
  void multiply(const float* x, const Weight& w, const Output& out, int64_t r, int64_t rows, int64_t j) const {
    strip_of_floats(x, w.C, static_cast<const float*>(w.strips) + j * w.C, out, r, rows, j);
  }
};

template <class Set>
struct Rounded {
  using T = typename Set::Integer;
  static constexpr bool kRounds = true;
  static int64_t depth(int64_t C) { return ceil_div(C, int8::kDeep) * int8::kDeep; }
  static int64_t bytes(int64_t rows, int64_t C) { return rows * (8 + depth(C) * static_cast<int64_t>(sizeof(T))); }

  // In `memory`: rows of at most C channels.
  Rounded(void* memory, int64_t rows, int64_t) : scale_(static_cast<float*>(memory)), rows_(rows) {}
  // Rows r.. of x [M, C].
  void take(const float* x, int64_t C, int64_t r, int64_t rows) const {
    kernel<int8::rounded_rows<T>>(x + r * C, C, integers(C), r, rows);
  }
  void multiply(const float*, const Weight& w, const Output& out, int64_t r, int64_t rows, int64_t j) const {
    int8::strip_of<Set>()(integers(w.C), {static_cast<const int8_t*>(w.strips), w.scale}, out, r, rows, j);
  }

 private:
  int8::Integers integers(int64_t C) const {
    auto* const totals = reinterpret_cast<int32_t*>(scale_ + rows_);
    return {scale_, totals, totals + rows_, depth(C)};
  }
  float* scale_;
  int64_t rows_;
};

// ---- the blocks

struct Block {
  const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
  Weight qkv, out, fc, proj;
};

struct Work {
  std::vector<Block> blocks;
  std::vector<int64_t> ends;   // [B + 1]: where each sequence starts, and M
  std::vector<int64_t> read;   // rows that are read out of the last block, where `reads`
  bool reads, causal;
  Activation activation;
  float eps;
  int64_t C, F, heads, longest, threads;
  float *s, *x, *wide;         // [M, C], [M, C], [M, max(3C, F)]
  float* y;                    // [rows that are read, C], or s
  void* rounded;
  int64_t rows() const { return ends.back(); }
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

template <class Operand>
void product(Member& member, const Work& work, const Operand& operand, const float* x, int64_t M, const Weight& w, const Output& out) {
  const int64_t fit = std::clamp(kBlock / (4 * std::max<int64_t>(1, w.C)), kLeast, kMost), blocks = ceil_div(M, fit);
  const int64_t R = ceil_div(M, std::max<int64_t>(1, blocks)), strips = ceil_div(w.N, kStrip);
  const int64_t parts = std::min(strips, ceil_div(kShare * work.threads, std::max<int64_t>(1, blocks)));
  member.each(blocks * parts, [&](int64_t t) {
    const int64_t r = t / parts * R, part = t % parts;
    for (int64_t s = part * strips / parts; s < (part + 1) * strips / parts; ++s)
      operand.multiply(x, w, out, r, std::min(R, M - r), s * kStrip);
  });
}

// task(r, rows) for a few rows at a time.
template <class F>
void each_few(Member& member, int64_t M, const F& task) {
  member.each(ceil_div(M, kFew), [&](int64_t t) { task(t * kFew, std::min(kFew, M - t * kFew)); });
}

template <class Operand>
void walk(Member member, const Work& work) {
  const int64_t C = work.C, F = work.F, K = C / work.heads, stride = 3 * C;
  float *s = work.s, *x = work.x;
  int64_t M = work.rows();
  const Operand operand(work.rounded, M, std::max(C, F));
  const int64_t floats = head::forward_scratch(work.longest, K) + work.longest;
  const Scratch scratch(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats, 16) * 64)));
  const auto normalised = [&](const float* weight, const float* bias) {
    each_few(member, M, [&](int64_t r, int64_t rows) {
      float mean[kFew], rstd[kFew];
      norm::forward_rows(s + r * C, nullptr, weight, bias, x + r * C, nullptr, mean, rstd, rows, C, work.eps);
      operand.take(x, C, r, rows);
    });
  };
  const auto taken = [&](const float* from, int64_t width) {
    if constexpr (Operand::kRounds) each_few(member, M, [&](int64_t r, int64_t rows) { operand.take(from, width, r, rows); });
  };
  for (const Block& block : work.blocks) {
    normalised(block.ln_1_weight, block.ln_1_bias);
    product(member, work, operand, x, M, block.qkv, {work.wide, stride, block.qkv.bias, Activation::none, false});
    member.each((static_cast<int64_t>(work.ends.size()) - 1) * work.heads, [&](int64_t t) {
      const int64_t b = t / work.heads, h = t % work.heads, start = work.ends[b];
      const head::Sequence sequence{work.ends[b + 1] - start, K, work.causal, 1.0f / std::sqrt(static_cast<float>(K))};
      const float* q = work.wide + start * stride + h * K;
      float* const lse = scratch.get();
      head::forward_head(sequence, q, q + C, q + 2 * C, stride, x + start * C + h * K, C, lse, lse + work.longest);
    });
    if (work.reads && &block == &work.blocks.back()) {
      M = static_cast<int64_t>(work.read.size());
      member.each(1, [&](int64_t) {
        for (int64_t i = 0; i < M; ++i) std::copy_n(s + work.read[i] * C, C, work.y + i * C);
        for (int64_t i = 0; i < M; ++i) std::copy_n(x + work.read[i] * C, C, s + i * C);
      });
      x = s;
      s = work.y;
    }
    taken(x, C);
    product(member, work, operand, x, M, block.out, {s, C, block.out.bias, Activation::none, true});
    normalised(block.ln_2_weight, block.ln_2_bias);
    product(member, work, operand, x, M, block.fc, {work.wide, F, block.fc.bias, work.activation, false});
    taken(work.wide, F);
    product(member, work, operand, work.wide, M, block.proj, {s, C, block.proj.bias, Activation::none, true});
  }
}

std::vector<int64_t> ends_of(const Tensor& x, const std::optional<Tensor>& cu_seqlens, int64_t M) {
  std::vector<int64_t> ends;
  if (cu_seqlens) {
    const Tensor given = contiguous(*cu_seqlens);
    const auto* const p = static_cast<const int32_t*>(given.data_ptr());
    ends.assign(p, p + given.numel());
  } else {
    for (int64_t b = 0; b <= x.size(0); ++b) ends.push_back(b * x.size(1));
  }
  bool rises = !ends.empty() && ends.front() == 0 && ends.back() == M;
  for (size_t b = 1; b < ends.size(); ++b) rises = rises && ends[b - 1] <= ends[b];
  STD_TORCH_CHECK(rises, "encoder: expected cu_seqlens to rise from 0 to ", M);
  return ends;
}

constexpr int64_t kTensors = 12, kProducts = 4;  // of a block
constexpr int64_t kStages = 12;                  // of a block at most

Tensor forward(
    const Tensor& x_, std::vector<Tensor> parameters, std::vector<Tensor> scales, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& read_, int64_t heads, bool causal, bool quick_gelu, double eps) {
  const Tensor x = contiguous(x_);
  const int64_t C = x.size(x.dim() - 1), M = x.numel() / std::max<int64_t>(1, C);
  Work work{};
  for (auto* all : {&parameters, &scales})
    for (Tensor& t : *all)
      if (!t.is_contiguous()) t = contiguous(t);
  for (size_t i = 0; i + kTensors <= parameters.size(); i += kTensors) {
    const Tensor* const p = &parameters[i];
    const auto weight = [&](int64_t n, int64_t inputs) {  // of which bias and scale have as many numbers as it has outputs
      const float* const scale = scales.empty() ? nullptr : floats(scales[i / kTensors * kProducts + n]);
      const Tensor &strips = p[2 + 2 * n + 2 * (n > 1)], &bias = p[3 + 2 * n + 2 * (n > 1)];
      return Weight{strips.data_ptr(), scale, floats(bias), inputs, bias.numel()};
    };
    work.F = p[9].numel();
    work.blocks.push_back(
        {floats(p[0]), floats(p[1]), floats(p[6]), floats(p[7]), weight(0, C), weight(1, C), weight(2, C), weight(3, work.F)});
  }
  const Tensor read = read_ ? contiguous(*read_) : x;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (read_) {
    const auto* const p = static_cast<const int32_t*>(read.data_ptr());
    work.read.assign(p, p + read.numel());
    STD_TORCH_CHECK(read.numel() <= M, "encoder: expected at most ", M, " rows to be read, got ", read.numel());
    for (int64_t r : work.read) STD_TORCH_CHECK(r >= 0 && r < M, "encoder: expected rows below ", M, " to be read, got ", r);
    sizes = {read.numel(), C};
  }
  Tensor y = new_empty(x, sizes);
  work.ends = ends_of(x, cu_seqlens, M);
  for (size_t b = 1; b < work.ends.size(); ++b) work.longest = std::max(work.longest, work.ends[b] - work.ends[b - 1]);
  work.reads = read_.has_value();
  work.causal = causal;
  work.activation = quick_gelu ? Activation::quick : Activation::exact;
  work.eps = static_cast<float>(eps);
  work.C = C;
  work.heads = heads;
  if (M == 0) return y;

  const int64_t widest = std::max(3 * C, work.F);
  const auto run = [&](auto operand) {
    using Operand = typename decltype(operand)::type;
    const int64_t bytes = Operand::bytes(M, std::max(C, work.F));
    const Tensor memory = new_empty(x, {M * (2 * C + widest) + ceil_div(bytes, 4)});
    work.x = mutable_floats(memory);
    work.wide = work.x + M * C;
    work.s = work.wide + M * widest;
    work.rounded = work.s + M * C;
    work.y = mutable_floats(y);
    if (!work.reads) work.s = work.y;
    std::copy_n(floats(x), M * C, work.s);
    // A thread for each 2^17 multiply-adds of a product (5 µs).
    work.threads = std::clamp<int64_t>(M * C * widest >> 17, 1, torch::stable::get_num_threads());
    together(work.threads, kStages * static_cast<int64_t>(work.blocks.size()), [&](Member member) { walk<Operand>(member, work); });
  };
  if (scales.empty()) run(std::type_identity<Floats>{});
  else int8::with_integers([&](auto set) { run(std::type_identity<Rounded<decltype(set)>>{}); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) { m.impl("encoder_cpu", TORCH_BOX(&forward)); }

}  // namespace clipfast
