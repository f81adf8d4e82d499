// Losses over all pairs of a batch on the CPU, fp32: products of matrices in panels, and `sweep`, which takes the similarity
// matrix S = factor · image · textᵀ block by block, lets the loss turn each block into its gradient where it lies in the cache, and
// multiplies that into the gradients of image and text.
//
// Written because torch's own product takes the AVX2 path of its library on AMD, at half the rate of AVX-512; and S, made, turned and
// used in the cache, is never read from memory. Every sum has a fixed order, whatever the number of threads.
#pragma once

#include "vec.h"

#include <algorithm>
#include <limits>

namespace clipfast {

// A matrix [rows, columns] lies in panels of 48 columns, (r, c) at [c / 48][r][c % 48]: three registers of 16 floats, six of 8, twelve of 4.
constexpr int64_t kPanel = 48;
constexpr int64_t kTall = 8;   // rows of a tile: 8 × 3 sums and 4 operands fill the 32 registers of AVX-512 or NEON
constexpr int64_t kChunk = 64;  // rows of a task
// A block of S, 6 MB: text is packed once for 2,048 rows (1 % of the time), and the 200 KB of a task stay in L2.
constexpr int64_t kBlockRows = 2048, kBlockColumns = 768;

// C[m, wv] = factor·(Σ_k A[i, k]·B[k, j]), or factor·(C + Σ ..) where `add`, over depth ≤ 48 terms, the sums in registers.
// A is 48 columns of a panel, or `turned`: (k, i) in place of (i, k).
template <int w, int m, int v, bool turned>
CLIPFAST_INLINE void tile(const float* A, const float* B, float* C, int64_t ldc, int64_t depth, bool add, float factor) {
  typename Vector<w>::Floats sum[m][v] = {};
  for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < v; ++j) sum[i][j] += A[turned ? k * kPanel + i : i * kPanel + k] * at<w>(B + k * kPanel + j * w);
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < v; ++j) {
      auto& c = at<w>(C + i * ldc + j * w);
      c = factor * (add ? c + sum[i][j] : sum[i][j]);
    }
}

// The tile of which only `rows` and `columns` remain inside C: what lies beyond them goes elsewhere.
template <int w, int m, int v, bool turned>
CLIPFAST_INLINE void fitted(
    const float* A, const float* B, float* C, int64_t ldc, int64_t rows, int64_t columns, int64_t depth, bool add, float factor) {
  constexpr int64_t width = v * w;
  float part[m * width];
  const bool inside = rows >= m && columns >= width;
  tile<w, m, v, turned>(A, B, inside ? C : part, inside ? ldc : width, depth, inside && add, inside ? factor : 1.0f);
  if (inside) return;
  for (int64_t i = 0; i < std::min<int64_t>(m, rows); ++i)
    for (int64_t j = 0; j < std::min(width, columns); ++j) {
      float& c = C[i * ldc + j];
      c = factor * (add ? c + part[i * width + j] : part[i * width + j]);
    }
}

// Sums grow by 48 terms at a time: operands and C of one step stay in L1, and short sums are the more exact ones (a third of the
// error of sums of 192, for 2 % of the time).
template <int w, bool turned>
CLIPFAST_INLINE void product_of(
    const float* A, int64_t next, const float* B, float* C, int64_t ldc, int64_t rows, int64_t columns, int64_t depth, bool add,
    float factor) {
  constexpr int m = w == 8 ? kTall / 2 : kTall;  // 4 × 3 sums and 4 operands fill the 16 registers of AVX2
  for (int64_t k = 0; k < depth; k += kPanel, A += next, B += kPanel * kPanel, add = true) {
    const int64_t deep = std::min(kPanel, depth - k);
    const float by = k + deep == depth ? factor : 1.0f;
    for (int64_t i = 0; i < rows; i += m)
      for (int64_t j = 0; j < columns; j += 3 * w) {
        const float* a = A + (turned ? i : i * kPanel);
        float* c = C + i * ldc + j;
        switch (std::min<int64_t>(3, (columns - j + w - 1) / w)) {
          case 1: fitted<w, m, 1, turned>(a, B + j, c, ldc, rows - i, columns - j, deep, add, by); break;
          case 2: fitted<w, m, 2, turned>(a, B + j, c, ldc, rows - i, columns - j, deep, add, by); break;
          default: fitted<w, m, 3, turned>(a, B + j, c, ldc, rows - i, columns - j, deep, add, by);
        }
      }
  }
}

// C[rows, columns] = factor·A·B, or factor·(C + A·B) where `add`, with A[rows, depth] in panels `next` floats apart and B[depth, 48].
constexpr auto product = kernel<product_of<kWideFloats, false>, product_of<kNarrowFloats, false>>;

// The same with Aᵀ, of A[depth, rows] in panels of which each holds 48 of the depth.
constexpr auto turned_product = kernel<product_of<kWideFloats, true>, product_of<kNarrowFloats, true>>;

// x[rows, D], its rows `ld` floats apart, into panels `next` floats apart, the last filled up with zeros.
CLIPFAST_INLINE void pack_rows(const float* x, int64_t ld, int64_t rows, int64_t D, float* to, int64_t next) {
  for (int64_t r = 0; r < rows; ++r, x += ld)
    for (int64_t d = 0; d < D; d += kPanel) {
      float* row = to + d / kPanel * next + r * kPanel;
      if (D - d >= kPanel) {
        for (int64_t l = 0; l < kPanel; ++l) row[l] = x[d + l];
      } else {
        std::fill(std::copy_n(x + d, D - d, row), row + kPanel, 0.0f);
      }
    }
}
constexpr auto pack = kernel<pack_rows>;

// xᵀ of x[rows, D], rows ≤ 48 and `ld` floats apart, as one panel [D][48], filled up with zeros.
CLIPFAST_INLINE void pack_columns(const float* x, int64_t ld, int64_t rows, int64_t D, float* to) {
  constexpr int w = kSquare;
  static constexpr float zeros[w] = {};
  for (int64_t i = 0; i < kPanel; i += w) {
    int64_t d = 0;
    for (; d + w <= D; d += w) {
      Vector<w>::Floats r[w];
#pragma GCC unroll 8
      for (int64_t l = 0; l < w; ++l) r[l] = at<w>(i + l < rows ? x + (i + l) * ld + d : zeros);
      turn(r);
#pragma GCC unroll 8
      for (int64_t l = 0; l < w; ++l) at<w>(to + (d + l) * kPanel + i) = r[l];
    }
    for (; d < D; ++d)
      for (int64_t l = i; l < i + w; ++l) to[d * kPanel + l] = l < rows ? x[l * ld + d] : 0.0f;
  }
}
constexpr auto pack_turned = kernel<pack_columns>;

// S of `rows` rows from row i of image and `columns` columns from column j of text, in panels `next` floats apart; the columns that
// fill up the last panel hold -inf.
struct Cell {
  float* s;
  int64_t next, i, rows, j, columns;
  float* panel(int64_t c) const { return s + c / kPanel * next; }
  float& operator()(int64_t row, int64_t column) const {
    return panel(column - j)[(row - i) * kPanel + (column - j) % kPanel];
  }
  // Whether row's pair lies among these columns.
  bool holds(int64_t column) const { return column >= j && column < j + columns; }
};

// Equal blocks of at most `most`, in multiples of `unit`.
inline int64_t share(int64_t count, int64_t most, int64_t unit) {
  return ceil_div(ceil_div(count, ceil_div(count, most)), unit) * unit;
}

inline Tensor in_fp32(const Tensor& x) { return contiguous(to(x, torch::headeronly::ScalarType::Float)); }

template <class F>
void each(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// image: [n, D], text: [N, D], contiguous. `turn_into(cell)` runs once for every cell of S and leaves the gradient in its place, the
// cells of a row in their order and never two at once; `after(i, rows)` once a block of rows is through. image_grad [n, D] = G · text
// and text_grad [N, D] = Gᵀ · image, where they are not null.
template <class Turn, class After>
void sweep(
    const Tensor& image_, const Tensor& text_, float factor, float* image_grad, float* text_grad, const Turn& turn_into,
    const After& after) {
  const int64_t n = image_.size(0), N = text_.size(0), D = image_.size(1), widths = ceil_div(D, kPanel);
  const float *image = floats(image_), *text = floats(text_);
  const int64_t R = share(n, kBlockRows, kChunk), C = share(N, kBlockColumns, kPanel);
  const int64_t row_panel = R * kPanel, column_panel = C * kPanel;
  const Tensor memory = new_empty(image_, {widths * row_panel + C * D + (image_grad ? widths * column_panel : 0) + R * C});
  float* const I = mutable_floats(memory);  // image in panels
  float* const S = I + widths * row_panel;
  float* const columns_of_text = S + R * C;      // textᵀ, a panel of it for every 48 columns of S
  float* const T = columns_of_text + C * D;      // text in panels
  for (int64_t i = 0; i < n; i += R) {
    const int64_t rows = std::min(R, n - i), chunks = ceil_div(rows, kChunk);
    each(chunks, [&](int64_t t) {
      const int64_t r = t * kChunk;
      pack(image + (i + r) * D, D, std::min(kChunk, rows - r), D, I + r * kPanel, row_panel);
    });
    for (int64_t j = 0; j < N; j += C) {
      const int64_t columns = std::min(C, N - j), panels = ceil_div(columns, kPanel);
      each(panels, [&](int64_t p) {
        const int64_t c = p * kPanel, count = std::min(kPanel, columns - c);
        pack_turned(text + (j + c) * D, D, count, D, columns_of_text + c * D);
        if (image_grad) pack(text + (j + c) * D, D, count, D, T + c * kPanel, column_panel);
      });
      each(chunks, [&](int64_t t) {
        const int64_t r = t * kChunk, height = std::min(kChunk, rows - r);
        float* const s = S + r * kPanel;
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t width = std::min(kPanel, columns - p * kPanel);
          float* const to = s + p * row_panel;
          product(
              I + r * kPanel, row_panel, columns_of_text + p * kPanel * D, to, kPanel, ceil_div(height, kTall) * kTall,
              ceil_div(width, 16) * 16, D, false, factor);
          for (int64_t l = 0; width < kPanel && l < height; ++l)
            std::fill(to + l * kPanel + width, to + (l + 1) * kPanel, -std::numeric_limits<float>::infinity());
        }
        turn_into(Cell{s, row_panel, i + r, height, j, columns});
        for (int64_t d = 0; image_grad && d < widths; ++d)
          product(
              s, row_panel, T + d * column_panel, image_grad + (i + r) * D + d * kPanel, D, height,
              std::min(kPanel, D - d * kPanel), columns, j > 0, 1.0f);
      });
      if (text_grad)
        each(widths * panels, [&](int64_t t) {
          const int64_t p = t / widths, d = t % widths, c = p * kPanel;
          turned_product(
              S + p * row_panel, kPanel * kPanel, I + d * row_panel, text_grad + (j + c) * D + d * kPanel, D,
              std::min(kPanel, columns - c), std::min(kPanel, D - d * kPanel), rows, i > 0, 1.0f);
        });
    }
    after(i, rows);
  }
}

}  // namespace clipfast
