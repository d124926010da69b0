// The activations of a linear layer and their derivatives, in fp32. The names are those of fastattn/activations.py.
#pragma once

#include "../common/ptx.cuh"
#include "linear.h"

#include <cmath>

namespace fastattn {

DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr float QUICK = 1.702f;                                             // quick_gelu(z) = z logistic(1.702 z)
constexpr float SQRT_HALF = 0.70710678118654752f;                           // sqrt(1 / 2)
constexpr float RSQRT_2PI = 0.39894228040143268f;                           // 1 / sqrt(2 pi)
constexpr float TANH_SCALE = 0.79788456080286536f, TANH_CUBIC = 0.044715f;  // sqrt(2 / pi); both of Hendrycks and Gimpel, 2016

DEVICE float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * z * (1.0f + erff(z * SQRT_HALF));
    case Activation::gelu_tanh:
      return 0.5f * z * (1.0f + tanhf(TANH_SCALE * (z + TANH_CUBIC * z * z * z)));
    case Activation::quick_gelu:
      return z * logistic(QUICK * z);
    case Activation::relu:
      return z > 0.0f || isnan(z) ? z : 0.0f;
    case Activation::silu:
      return z * logistic(z);
    case Activation::none:
      break;
  }
  return z;
}

DEVICE float derivative(Activation activation, float z) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * (1.0f + erff(z * SQRT_HALF)) + z * RSQRT_2PI * expf(-0.5f * z * z);
    case Activation::gelu_tanh: {
      float t = tanhf(TANH_SCALE * (z + TANH_CUBIC * z * z * z));
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * TANH_SCALE * (1.0f + 3.0f * TANH_CUBIC * z * z);
    }
    case Activation::quick_gelu: {
      float s = logistic(QUICK * z);
      return s + QUICK * z * s * (1.0f - s);
    }
    case Activation::relu:
      return z > 0.0f ? 1.0f : 0.0f;
    case Activation::silu: {
      float s = logistic(z);
      return s + z * s * (1.0f - s);
    }
    case Activation::none:
      break;
  }
  return 1.0f;
}

}  // namespace fastattn
