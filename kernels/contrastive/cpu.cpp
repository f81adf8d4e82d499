// Statistics and gradients of the contrastive loss on the CPU, fp32, in the sweep of gemm.h.
#include "gemm.h"

#include <vector>

namespace clipfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

CLIPFAST_INLINE float larger(float a, float b) { return a > b ? a : b; }

// The maxima and sums of exp(s - maximum) of two sets, for `count` rows or columns, into those of both.
CLIPFAST_INLINE void merged(float* most, float* sum, const float* other_most, const float* other_sum, int64_t count) {
#pragma omp simd
  for (int64_t l = 0; l < count; ++l) {
    const float top = larger(most[l], other_most[l]);
    sum[l] = sum[l] * exp_fp32(most[l] - top) + other_sum[l] * exp_fp32(other_most[l] - top);
    most[l] = top;
  }
}
constexpr auto merge = kernel<merged>;

// Maximum and Σ exp(s - maximum) of every row and column of a cell. A NaN is passed over by the maxima and comes out of the sums.
// An exponential each for rows and columns: one for both would save nothing at D = 512, 5 % at D = 64, and lose digits.
CLIPFAST_INLINE void statistics_of(const Cell& cell, float* row_max, float* row_sum, float* col_max, float* col_sum) {
  float lanes[kChunk][kPanel], most[kPanel], sum[kPanel];
  std::fill_n(lanes[0], cell.rows * kPanel, -kInfinity);
  for (int64_t c = 0; c < cell.columns; c += kPanel) {
    const float* s = cell.panel(c);
    std::fill_n(most, kPanel, -kInfinity);
    for (int64_t i = 0; i < cell.rows; ++i, s += kPanel)
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        most[l] = larger(s[l], most[l]);
        lanes[i][l] = larger(s[l], lanes[i][l]);
      }
    std::copy_n(most, std::min(kPanel, cell.columns - c), col_max + c);
  }
  for (int64_t i = 0; i < cell.rows; ++i) {
    float* const m = lanes[i];
#pragma omp simd
    for (int64_t l = 0; l < 16; ++l) m[l] = larger(larger(m[l], m[l + 16]), m[l + 32]);
    row_max[i] = *std::max_element(m, m + 16);
  }
  std::fill_n(lanes[0], cell.rows * kPanel, 0.0f);
  for (int64_t c = 0; c < cell.columns; c += kPanel) {
    const int64_t width = std::min(kPanel, cell.columns - c);
    const float* s = cell.panel(c);
    std::fill(std::copy_n(col_max + c, width, most), most + kPanel, 0.0f);
    std::fill_n(sum, kPanel, 0.0f);
    for (int64_t i = 0; i < cell.rows; ++i, s += kPanel)
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        lanes[i][l] += exp_to_88(s[l] - row_max[i]);
        sum[l] += exp_to_88(s[l] - most[l]);
      }
    std::copy_n(sum, width, col_sum + c);
  }
  for (int64_t i = 0; i < cell.rows; ++i) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < kPanel; ++l) total += lanes[i][l];
    row_sum[i] = total;
  }
}
constexpr auto statistics = kernel<statistics_of>;

struct Side {  // of the rows or of the columns of S
  const float *lse, *grad;
};

// s -> row.grad_i·exp(s - row.lse_i) + column.grad_j·exp(s - column.lse_j), in place.
CLIPFAST_INLINE void gradient_of(const Cell& cell, Side row, Side column) {
  float lse[kPanel], grad[kPanel];
  for (int64_t c = 0; c < cell.columns; c += kPanel) {
    const int64_t width = std::min(kPanel, cell.columns - c);
    float* s = cell.panel(c);
    std::fill(std::copy_n(column.lse + c, width, lse), lse + kPanel, 0.0f);
    std::fill(std::copy_n(column.grad + c, width, grad), grad + kPanel, 0.0f);
    for (int64_t i = 0; i < cell.rows; ++i, s += kPanel)
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l)
        s[l] = row.grad[i] * exp_to_88(s[l] - row.lse[i]) + grad[l] * exp_to_88(s[l] - lse[l]);
  }
}
constexpr auto gradient = kernel<gradient_of>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& image_, const Tensor& text_, const Tensor& scale, int64_t offset) {
  const Tensor image = contiguous(image_), text = contiguous(text_);
  const int64_t n = image.size(0), N = text.size(0);
  Tensor row_max = new_empty(image, {n}), row_sum = new_zeros(image, {n}), diagonal = new_zeros(image, {n});
  Tensor col_max = new_empty(image, {N}), col_sum = new_zeros(image, {N});
  float *rm = mutable_floats(row_max), *rs = mutable_floats(row_sum), *own = mutable_floats(diagonal);
  float *cm = mutable_floats(col_max), *cs = mutable_floats(col_sum);
  std::fill(rm, rm + n, -kInfinity);
  std::fill(cm, cm + N, -kInfinity);
  // The columns' statistics over each chunk of a block of rows, merged in order when the block is through.
  const int64_t chunks = ceil_div(std::min(n, kBlockRows), kChunk);
  std::vector<float> part_max(chunks * N), part_sum(chunks * N);
  sweep(
      image, text, *floats(in_fp32(scale)), nullptr, nullptr,
      [&](const Cell& cell) {
        float most[kChunk], sum[kChunk];
        const int64_t part = cell.i / kChunk % chunks * N + cell.j;
        statistics(cell, most, sum, part_max.data() + part, part_sum.data() + part);
        merge(rm + cell.i, rs + cell.i, most, sum, cell.rows);
        for (int64_t i = cell.i; i < cell.i + cell.rows; ++i)
          if (cell.holds(i + offset)) own[i] = cell(i, i + offset);
      },
      [&](int64_t i, int64_t rows) {
        each(ceil_div(N, kBlockColumns), [&](int64_t t) {
          const int64_t j = t * kBlockColumns, columns = std::min(kBlockColumns, N - j);
          for (int64_t r = i; r < i + rows; r += kChunk) {
            const int64_t part = r / kChunk % chunks * N + j;
            merge(cm + j, cs + j, part_max.data() + part, part_sum.data() + part, columns);
          }
        });
      });
  return {row_max, row_sum, col_max, col_sum, diagonal};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& image_, const Tensor& text_, const Tensor& scale, int64_t offset, const Tensor& row_lse_, const Tensor& col_lse_,
    const Tensor& row_grad_, const Tensor& col_grad_, const Tensor& diagonal_grad_, bool want_image, bool want_text) {
  const Tensor image = contiguous(image_), text = contiguous(text_), row_lse = in_fp32(row_lse_), col_lse = in_fp32(col_lse_),
               row_grad = in_fp32(row_grad_), col_grad = in_fp32(col_grad_), diagonal_grad = in_fp32(diagonal_grad_);
  const int64_t n = image.size(0), N = text.size(0), D = image.size(1);
  Tensor image_grad = new_empty(image, {want_image ? n : 0, D}), text_grad = new_empty(image, {want_text ? N : 0, D});
  const float* own = floats(diagonal_grad);
  sweep(
      image, text, *floats(in_fp32(scale)), want_image ? mutable_floats(image_grad) : nullptr,
      want_text ? mutable_floats(text_grad) : nullptr,
      [&](const Cell& cell) {
        gradient(
            cell, {floats(row_lse) + cell.i, floats(row_grad) + cell.i}, {floats(col_lse) + cell.j, floats(col_grad) + cell.j});
        for (int64_t i = cell.i; i < cell.i + cell.rows; ++i)
          if (cell.holds(i + offset)) cell(i, i + offset) = own[i];
      },
      [](int64_t, int64_t) {});
  return {image_grad, text_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
  m.impl("contrastive_cpu", TORCH_BOX(&forward));
  m.impl("contrastive_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace clipfast
