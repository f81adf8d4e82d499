// A Linear of 8-bit integers on the CPU, fp32 in and out.
//
// Rows of x are rounded once; then every strip of 32 output channels is multiplied with all rows of a block while it lies in the
// cache.
#include "strip.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace clipfast {
namespace {

using namespace int8;

constexpr int64_t kTall = 12;                        // rows of a tile at most
constexpr int64_t kBlock = 256 << 10;                // bytes of the rows of a block, beside a strip in L2

// x: [M, C] -> out.y: [M, N].
template <class Set>
void multiply(const Tensor& x_, const Tensor& weight, const float* scale, int64_t M, int64_t C, const Output& out) {
  using T = typename Set::Integer;
  const int64_t depth = weight.size(1) * kDeep, strips = weight.size(0);
  const Tensor memory = new_empty(x_, {ceil_div(M * (depth * static_cast<int64_t>(sizeof(T)) + 8), 4)});
  float* const scales = mutable_floats(memory);
  auto* const totals = reinterpret_cast<int32_t*>(scales + M);
  const Integers q{scales, totals, totals + M, depth};
  const Bytes w{static_cast<const int8_t*>(weight.data_ptr()), scale};
  const float* const x = floats(x_);
  // A share of less than 2^15 numbers takes as long as giving it away.
  torch::stable::parallel_for(0, M, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, C)), [&](int64_t begin, int64_t end) {
    kernel<rounded_rows<T>>(x + begin * C, C, q, begin, end - begin);
  });
  const int64_t fit = kBlock / std::max<int64_t>(1, depth * static_cast<int64_t>(sizeof(T))) / kTall * kTall;
  const int64_t R = std::max(4 * kTall, fit), blocks = ceil_div(M, R);
  torch::stable::parallel_for(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r = t / strips * R, s = t % strips;
      strip_of<Set>()(q, w, out, r, std::min(R, M - r), s * kStrip);
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
  const Output out{mutable_floats(y), N, bias_ ? floats(bias) : nullptr, activation, false};
  with_integers([&](auto set) { multiply<decltype(set)>(x, weight, floats(scale), M, C, out); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) { m.impl("int8_linear_cpu", TORCH_BOX(&forward)); }

}  // namespace clipfast
