// What becomes of the sums of a Linear: a bias, an activation, the residual stream.
#pragma once

#include "vec.h"

#include <algorithm>

namespace clipfast {

constexpr int64_t kStrip = 32;  // output channels of a Linear whose weights lie together

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

struct Output {
  float* y;           // [M, N]
  int64_t N;
  const float* bias;  // [N] or null
  Activation activation;
  bool add;           // to what y holds
};

template <Activation activation, class Sum>
CLIPFAST_INLINE void put_as(const Output& out, int64_t r, int64_t j, const Sum& sum) {
  const int64_t width = std::min(kStrip, out.N - j);
  const float* const bias = out.bias ? out.bias + j : nullptr;
  float* const y = out.y + r * out.N + j;
  for (int64_t c = 0; c < width; ++c) {
    const float x = sum(c) + (bias ? bias[c] : 0.0f);
    const float v = activation == Activation::none ? x : activation == Activation::quick ? quick_gelu(x) : exact_gelu(x);
    y[c] = out.add ? y[c] + v : v;
  }
}

// Row r, columns j..j + 31, of which sum(c) is the product.
template <class Sum>
CLIPFAST_INLINE void put(const Output& out, int64_t r, int64_t j, const Sum& sum) {
  switch (out.activation) {
    case Activation::quick: put_as<Activation::quick>(out, r, j, sum); break;
    case Activation::exact: put_as<Activation::exact>(out, r, j, sum); break;
    default: put_as<Activation::none>(out, r, j, sum);
  }
}

}  // namespace clipfast
