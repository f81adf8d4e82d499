// A batch of products of matrices on the CPU, fp32, operands of any strides with neighbours along rows or along columns.
//
// Both are packed into panels (gemm.h), a once for all of its products and b where its panel is used.
#include "gemm.h"

#include <utility>
#include <vector>

namespace clipfast {
namespace {

// [n, rows, columns]: rows side by side, or columns where `turned`. `ld`: floats from one to the next.
struct Matrices {
  Tensor held;
  const float* p;
  int64_t rows, columns, next, ld;
  bool turned;

  explicit Matrices(const Tensor& given)
      : held(given.stride(1) == 1 || given.stride(2) == 1 ? given : contiguous(given)), p(floats(held)), rows(held.size(1)),
        columns(held.size(2)), next(held.stride(0)), turned(held.stride(2) != 1) {
    ld = held.stride(turned ? 2 : 1);
  }
  Matrices transposed() const {
    Matrices t(*this);
    std::swap(t.rows, t.columns);
    t.turned = !turned;
    return t;
  }
  const float* at(int64_t n, int64_t r, int64_t c) const { return p + n * next + (turned ? c * ld + r : r * ld + c); }
  // `height` rows from (r, c) on, `width` columns of each, in panels `apart` floats from one to the next.
  void panels(int64_t n, int64_t r, int64_t c, int64_t height, int64_t width, float* to, int64_t apart) const {
    if (!turned) return pack(at(n, r, c), ld, height, width, to, apart);
    for (int64_t j = 0; j < width; j += kPanel, to += apart) pack_turned(at(n, r, c + j), ld, std::min(kPanel, width - j), height, to);
  }
};

// a [n, M, K] · b [n, K, N] -> [n, M, N]
Tensor multiplied(const Matrices& a, const Matrices& b, int64_t n) {
  const int64_t M = a.rows, K = a.columns, N = b.columns, chunks = ceil_div(M, kChunk), panels = ceil_div(N, kPanel);
  const int64_t next = ceil_div(M, kTall) * kTall * kPanel, depths = ceil_div(K, kPanel);
  Tensor out = new_empty(a.held, {n, M, N}), memory = new_empty(a.held, {n * depths * next});
  float *c = mutable_floats(out), *packed = mutable_floats(memory);
  each(n * chunks, [&](int64_t t) {
    const int64_t h = t / chunks, i = t % chunks * kChunk;
    a.panels(h, i, 0, std::min(kChunk, M - i), K, packed + h * depths * next + i * kPanel, next);
  });
  torch::stable::parallel_for(0, n * panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(std::min(K, kBlockColumns) * kPanel);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t h = t / panels, j = t % panels * kPanel, width = std::min(kPanel, N - j);
      for (int64_t k = 0; k < K; k += kBlockColumns) {
        const int64_t deep = std::min(kBlockColumns, K - k);
        b.panels(h, k, j, deep, width, panel.data(), 0);
        for (int64_t i = 0; i < M; i += kChunk)
          product(
              packed + (h * depths + k / kPanel) * next + i * kPanel, next, panel.data(), c + (h * M + i) * N + j, N,
              std::min(kChunk, M - i), width, deep, k > 0, 1.0f);
      }
    }
  });
  return out;
}

Tensor forward(const Tensor& a, const Tensor& b) { return multiplied(Matrices(a), Matrices(b), a.size(0)); }

// A gradient lies in memory as its operand does.
Tensor gradient(const Matrices& left, const Matrices& right, int64_t n, bool turned) {
  if (!turned) return multiplied(left, right, n);
  return transpose(multiplied(right.transposed(), left.transposed(), n), 1, 2);
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& a_, const Tensor& b_, bool need_a, bool need_b) {
  const Matrices dy(dy_), a(a_), b(b_);
  const int64_t n = a_.size(0);
  return {
      need_a ? gradient(dy, b.transposed(), n, a.turned) : new_empty(dy_, {0}),
      need_b ? gradient(a.transposed(), dy, n, b.turned) : new_empty(dy_, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("bmm_cpu", TORCH_BOX(&forward));
  m.impl("bmm_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
