// Convolutions of few channels on the CPU, fp32, channels-last: 3 × 3 with padding 1, and 1 × 1.
//
// The sums of a tile of places × channels stay in registers while every value of their patches meets its weights. oneDNN gives
// the lanes of a register to the channels of one place, so that 8 channels leave half of them empty; here a register then holds a
// group of G = 16 / O neighbouring places (of AVX2 or NEON 8 / O). Their patches overlap: they are one patch, a little wider, whose weights are zero
// where a place does not look. 3 × 3 reads an image from a frame of zeros in L1, in which the rows of a patch are runs of memory.
#include "vec.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace clipfast {
namespace {

int64_t unit() { return wide ? 16 : 8; }  // floats that groups fill; two units are a block, the result's part in a tile
constexpr int64_t kBand = 6144;                      // floats of a band of rows in its frame, 24 KB: half of L1
constexpr int64_t kChunk = 96;                       // places of a 1 × 1 convolution at a time
constexpr int64_t kDeep = 8;                         // rows of a weight's gradient that are summed at a time, or twice as many
// Tasks of a weight's gradient, each with sums of its own that are added up in their order; fewer, down to 8, where all of them
// would be more than so many floats, 1 MB.
constexpr int64_t kTasks = 32, kSums = 1 << 18;

struct Geometry {
  int64_t B, H, W, I, O, size, stride, h, w;  // images [B, H, W, I] -> [B, h, w, O], weights size × size
  int64_t block, G, lanes;                    // of a tile; places of a group, floats of its result
  int64_t groups, step, run, deep, width, band, bands;
  bool whole;  // whether groups fill their registers, and rows of the result their groups: memory then holds one after the other

  Geometry(int64_t B, int64_t H, int64_t W, int64_t I, int64_t O, int64_t size, int64_t stride)
      : B(B), H(H), W(W), I(I), O(O), size(size), stride(stride), h((H - 1) / stride + 1), w((W - 1) / stride + 1) {
    block = 2 * unit(), G = std::max<int64_t>(1, unit() / O), lanes = ceil_div(G * O, unit()) * unit();
    groups = ceil_div(w, G), whole = groups * lanes == w * O;
    step = stride * G * I;                // floats from a group's patch to the next
    run = (stride * (G - 1) + size) * I;  // of a row of a patch
    deep = ceil_div(run, kDeep) * kDeep;  // and of that row in the gradient
    width = (groups - 1) * step + run;    // of a row in its frame
    bands = ceil_div(h, std::clamp<int64_t>((kBand / width - 3) / stride + 1, 1, h)), band = ceil_div(h, bands);
  }
  int64_t rows(int64_t first) const { return std::min(band, h - first); }  // of the result, in the band from this row on
  int64_t frame() const { return ((band - 1) * stride + 3) * width + kDeep; }
};

// f(p, next, o, tap, count): p[i·next + l] is the packed weight of input channel i and output channel o + l < o + count, for one
// tap ky·size + kx. `depth`: input values of a row of a patch, in the weights `run`, in their gradient `deep`.
template <class F>
void each_run(const Geometry& s, float* packed, int64_t depth, const F& f) {
  for (int64_t g = 0; g < s.G; ++g)
    for (int64_t o = 0; o < s.O; o += s.block)
      for (int64_t ky = 0; ky < s.size; ++ky)
        for (int64_t kx = 0; kx < s.size; ++kx) {
          const int64_t next = std::min(s.block, s.lanes - o), k = ky * depth + (g * s.stride + kx) * s.I;
          f(packed + o * s.size * depth + k * next + g * s.O, next, o, ky * s.size + kx, std::min(s.block, s.O - o));
        }
}

// Weights as the tiles read them, [block of lanes][ky][run][lane], zero where a place does not see a column of its group's patch.
// w[O, size, size, I], or `turned` around: w[I, size, size, O] from its end.
std::vector<float> packed(const Geometry& s, const float* w, bool turned) {
  const int64_t taps = s.size * s.size;
  std::vector<float> out(s.size * s.run * s.lanes, 0.0f);
  each_run(s, out.data(), s.run, [&](float* p, int64_t next, int64_t o, int64_t tap, int64_t count) {
    for (int64_t i = 0; i < s.I; ++i)
      if (turned)
        std::copy_n(w + (i * taps + taps - 1 - tap) * s.O + o, count, p + i * next);
      else
        for (int64_t l = 0; l < count; ++l) p[i * next + l] = w[((o + l) * taps + tap) * s.I + i];
  });
  return out;
}

// The rows of an image [H, W, I] that `rows` rows of the result from `first` on see, in a frame of zeros. `apart`: the image is x
// with zeros between its places, so many places and rows from one to the next.
void framed(const Geometry& s, const float* x, int64_t apart, int64_t first, int64_t rows, float* to) {
  const int64_t places = std::min(s.W, s.width / s.I - 1), W = (s.W - 1) / apart + 1;
  for (int64_t y = first * s.stride - 1, end = (first + rows - 1) * s.stride + 2; y < end; ++y, to += s.width) {
    const bool inside = y >= 0 && y < s.H && y % apart == 0;
    if (!inside || apart > 1) std::fill(to, to + s.width, 0.0f);
    if (!inside) continue;
    const float* from = x + y / apart * W * s.I;
    if (apart > 1) {
      for (int64_t p = 0; p < places; p += apart) std::copy_n(from + p / apart * s.I, s.I, to + (p + 1) * s.I);
      continue;
    }
    std::fill(to, to + s.I, 0.0f);
    std::copy_n(from, places * s.I, to + s.I);
    std::fill(to + (places + 1) * s.I, to + s.width, 0.0f);
  }
}

// M groups beside one another, V registers of each: `size` runs of x, `pitch` floats apart.
template <int w, int M, int V>
CLIPFAST_INLINE void tile(
    const float* x, int64_t pitch, int64_t size, int64_t step, int64_t run, const float* weights, float* y, int64_t lanes) {
  typename Vector<w>::Floats sum[M][V] = {};
  for (int64_t ky = 0; ky < size; ++ky, x += pitch) {
    // Three pointers and three distances: the compiler would keep twelve distances, and not all of them in registers.
    const float *from[] = {x, x + 4 * step, x + 8 * step};
    asm("" : "+r"(from[1]), "+r"(from[2]));
    for (int64_t k = 0; k < run; ++k, weights += V * w)
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[m][v] += from[m / 4][m % 4 * step + k] * at<w>(weights + v * w);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) at<w>(y + m * lanes + v * w) = sum[m][v];
}

template <int w, int M, int V>
CLIPFAST_INLINE void tiles(
    const float* x, int64_t pitch, int64_t size, int64_t step, int64_t run, const float* weights, float* y, int64_t lanes,
    int64_t groups) {
  int64_t q = 0;
  for (; q + M <= groups; q += M) tile<w, M, V>(x + q * step, pitch, size, step, run, weights, y + q * lanes, lanes);
  for (; q + 4 <= groups; q += 4) tile<w, 4, V>(x + q * step, pitch, size, step, run, weights, y + q * lanes, lanes);
  for (; q < groups; ++q) tile<w, 1, V>(x + q * step, pitch, size, step, run, weights, y + q * lanes, lanes);
}

template <int w, int M, int V>
CLIPFAST_INLINE void row_of(
    const float* x, int64_t pitch, int64_t size, int64_t step, int64_t run, const float* weights, float* y, int64_t lanes,
    int64_t groups) {
  constexpr int64_t block = V * w;
  int64_t j = 0;
  for (; j + block <= lanes; j += block)
    tiles<w, M, V>(x, pitch, size, step, run, weights + j * size * run, y + j, lanes, groups);
  if (j < lanes) tiles<w, M, V / 2>(x, pitch, size, step, run, weights + j * size * run, y + j, lanes, groups);
}

// y[groups, lanes] of groups beside one another. A tile's sums, its weights and a value of x are all in registers: 12 × 2 and in
// NEON 6 × 4 sums of 32, 6 × 2 in AVX2's 16.
constexpr int kBeside = 16 / kNarrowFloats;
constexpr auto row = kernel<row_of<kWideFloats, 12, 2>, row_of<kNarrowFloats, 6, kBeside>>;

// sums[d][lane] += Σ x[place + d]·dy[place][lane] over rows of groups, for d < D and V registers.
template <int w, int D, int V>
CLIPFAST_INLINE void weight_tile(
    const float* x, int64_t pitch, int64_t step, const float* dy, int64_t lanes, int64_t rows, int64_t groups, float* sums) {
  using Floats = typename Vector<w>::Floats;
  Floats sum[D][V] = {};  // short sums first: the more exact ones
  for (int64_t r = 0; r < rows; ++r, x += pitch) {
    const float* from = x;
    for (int64_t q = 0; q < groups; ++q, from += step, dy += lanes)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Floats g = at<w>(dy + v * w);
#pragma GCC unroll 16
        for (int d = 0; d < D; ++d) sum[d][v] += from[d] * g;
      }
  }
#pragma GCC unroll 16
  for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) at<w>(sums + (d * V + v) * w) += sum[d][v];
}

// V registers of a block and D rows of the sums at a time; of half a block twice the rows, where there are as many left.
template <int w, int D, int V>
CLIPFAST_INLINE void weight_sums_of(
    const float* x, int64_t below, int64_t pitch, int64_t size, int64_t step, int64_t deep, const float* dy, int64_t lanes,
    int64_t rows, int64_t groups, float* sums) {
  constexpr int64_t block = V * w;
  for (int64_t j = 0; j < lanes; j += block, dy += block)
    for (int64_t ky = 0; ky < size; ++ky)
      for (int64_t k = 0; k < deep;) {
        const float* from = x + ky * below + k;
        if (lanes - j >= block)
          weight_tile<w, D, V>(from, pitch, step, dy, lanes, rows, groups, sums), sums += D * block, k += D;
        else if (deep - k >= 2 * D)
          weight_tile<w, 2 * D, V / 2>(from, pitch, step, dy, lanes, rows, groups, sums), sums += D * block, k += 2 * D;
        else
          weight_tile<w, D, V / 2>(from, pitch, step, dy, lanes, rows, groups, sums), sums += D * block / 2, k += D;
      }
}

// All of a weight's gradient, [block of lanes][ky][deep][lane], from `rows` rows of groups. Row ky of the weights sees x `below`
// floats further on.
constexpr auto weight_sums = kernel<weight_sums_of<kWideFloats, 8, 2>, weight_sums_of<kNarrowFloats, 4, kBeside>>;

// Asks L2 for what comes next, while what is there keeps the arithmetic busy.
CLIPFAST_INLINE void ahead(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, 0, 2);
}

// [rows of groups, lanes] -> rows of w places, or back.
template <bool back, class Groups, class Places>
void rows_of(const Geometry& s, Groups* groups, Places* places, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < s.groups; ++q) {
      const int64_t count = std::min(s.G, s.w - q * s.G) * s.O;
      auto* const group = groups + (r * s.groups + q) * s.lanes;
      auto* const place = places + (r * s.w + q * s.G) * s.O;
      if constexpr (back)
        std::copy_n(place, count, group);
      else
        std::copy_n(group, count, place);
    }
}

// y[B, h, w, O] of images [B, H, W, I], which are x with zeros between its places where they are more than one apart.
void convolve(const Geometry& s, const float* x, int64_t apart, const std::vector<float>& weights, float* y) {
  if (s.size == 1) {  // no place sees another: rows do not matter
    const int64_t places = s.B * s.h * s.w;
    torch::stable::parallel_for(0, ceil_div(places, kChunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin * kChunk; p < std::min(end * kChunk, places); p += kChunk) {
        ahead(x + (p + kChunk) * s.I, kChunk * s.I);
        row(x + p * s.I, 0, 1, s.I, s.I, weights.data(), y + p * s.O, s.O, std::min(kChunk, places - p));
      }
    });
    return;
  }
  const int64_t image = ceil_div(s.H, apart) * ceil_div(s.W, apart) * s.I;
  torch::stable::parallel_for(0, s.B * s.bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> frame(s.frame()), one(s.whole ? 0 : s.groups * s.lanes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / s.bands, first = t % s.bands * s.band;
      if (s.bands == 1) ahead(x + (b + 1) * image, image);
      framed(s, x + b * image, apart, first, s.rows(first), frame.data());
      for (int64_t r = 0; r < s.rows(first); ++r) {
        float* const to = y + (b * s.h + first + r) * s.w * s.O;
        float* const out = s.whole ? to : one.data();
        row(frame.data() + r * s.stride * s.width, s.width, 3, s.step, s.run, weights.data(), out, s.lanes, s.groups);
        if (!s.whole) rows_of<false>(s, out, to, 1);
      }
    }
  });
}

// to[O, size, size, I], the gradient of the weights.
void weight_gradient(const Geometry& s, const float* x, const float* dy, float* to) {
  const int64_t size = s.size * s.deep * s.lanes, places = s.B * s.h * s.w, image = s.H * s.W * s.I, result = s.h * s.w * s.O;
  const int64_t units = s.size == 1 ? ceil_div(places, kChunk) : s.B * s.bands;
  const int64_t tasks = std::min(units, std::clamp<int64_t>(kSums / size, 8, kTasks));
  const std::unique_ptr<float[]> parts(new float[tasks * size]);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> frame(s.size == 1 ? 0 : s.frame(), 0.0f), filled(s.whole ? 0 : s.band * s.groups * s.lanes, 0.0f);
    for (int64_t task = begin; task < end; ++task) {
      float* const sums = parts.get() + task * size;
      std::fill(sums, sums + size, 0.0f);
      for (int64_t t = task * units / tasks; t < (task + 1) * units / tasks; ++t) {
        if (s.size == 1) {
          const int64_t p = t * kChunk, next = p + kChunk;
          ahead(x + next * s.I, kChunk * s.I), ahead(dy + next * s.O, kChunk * s.O);
          weight_sums(x + p * s.I, 0, 0, 1, s.I, s.I, dy + p * s.O, s.O, 1, std::min(kChunk, places - p), sums);
          continue;
        }
        const int64_t b = t / s.bands, first = t % s.bands * s.band, rows = s.rows(first);
        if (s.bands == 1) ahead(x + (b + 1) * image, image), ahead(dy + (b + 1) * result, result);
        framed(s, x + b * image, 1, first, rows, frame.data());
        const float* by = dy + b * result + first * s.w * s.O;
        if (!s.whole) rows_of<true>(s, filled.data(), by, rows), by = filled.data();
        weight_sums(frame.data(), s.width, s.stride * s.width, 3, s.step, s.deep, by, s.lanes, rows, s.groups, sums);
      }
    }
  });
  torch::stable::parallel_for(0, size, 1 << 13, [&](int64_t begin, int64_t end) {
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = begin; i < end; ++i) parts[i] += parts[task * size + i];
  });
  std::fill(to, to + s.O * s.size * s.size * s.I, 0.0f);
  each_run(s, parts.get(), s.deep, [&](const float* p, int64_t next, int64_t o, int64_t tap, int64_t count) {
    for (int64_t i = 0; i < s.I; ++i)
      for (int64_t l = 0; l < count; ++l) to[((o + l) * s.size * s.size + tap) * s.I + i] += p[i * next + l];
  });
}

// [B, C, h, w], channels-last.
Tensor new_images(const Tensor& like, int64_t B, int64_t C, int64_t h, int64_t w) {
  return transpose(transpose(new_empty(like, {B, h, w, C}), 1, 3), 2, 3);
}

Tensor forward(const Tensor& x, const Tensor& weight, int64_t stride) {
  const Geometry s(x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), weight.size(2), stride);
  Tensor y = new_images(x, s.B, s.O, s.h, s.w);
  convolve(s, floats(x), 1, packed(s, floats(weight), false), mutable_floats(y));
  return y;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t stride, bool need_x, bool need_weight) {
  const int64_t B = x.size(0), I = x.size(1), H = x.size(2), W = x.size(3), O = dy.size(1), size = weight.size(2);
  Tensor dx = need_x ? new_images(dy, B, I, H, W) : new_empty(dy, {0});
  Tensor dweight = need_weight ? new_images(dy, O, I, size, size) : new_empty(dy, {0});
  if (need_x) {  // the convolution of dy, its places `stride` apart, with the weights turned around
    const Geometry s(B, H, W, O, I, size, 1);
    convolve(s, floats(dy), stride, packed(s, floats(weight), true), mutable_floats(dx));
  }
  if (need_weight) weight_gradient(Geometry(B, H, W, I, O, size, stride), floats(x), floats(dy), mutable_floats(dweight));
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("convolution_cpu", TORCH_BOX(&forward));
  m.impl("convolution_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
