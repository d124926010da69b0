// The requests of the FFN kernels, as plain data. Matrices are row-major; strides are in elements.
#pragma once

#include "../common/kernel.h"

#include <cstdint>

namespace fastattn {

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, relu, silu };

// z = x weight^T + bias, y = activation(z) + residual.
struct Linear {
  const void* x;         // (rows, K)
  int64_t x_row;         // stride
  const void* weight;    // (F, K)
  int64_t weight_row;    // stride
  const void* bias;      // (F,), or null
  const void* residual;  // (rows, F) contiguous, or null
  void* z;               // (rows, F) contiguous, or null where it is not wanted
  void* y;               // (rows, F) contiguous
  int64_t rows;
  int K, F;
  Activation activation;
  bool bfloat16;   // x, weight and z are bf16; otherwise fp16
  bool wide_bias;  // bias is fp32; otherwise x's dtype
  bool wide;       // residual and y are fp32; otherwise x's dtype
  bool aligned;    // rows of x and weight start at multiples of 16 bytes
  bool vectors;    // so do rows of residual, z and y
};

// Both throw std::runtime_error with the kernel's name if it cannot be launched.
void linear(const Linear& request, uintptr_t stream);

// dz = dy activation'(z), and its sums over `splits` runs of rows.
struct ActivationBackward {
  const void* dy;  // (rows, F)
  int64_t dy_row;  // stride
  const void* z;   // (rows, F) contiguous, or null: then there is no activation, and no dz
  void* dz;        // (rows, F) contiguous
  float* sums;     // (splits, F), or null where they are not wanted
  int64_t rows;
  int F, splits;
  Activation activation;
  bool bfloat16;
  bool vectors;  // rows of dy, z and dz start at multiples of 16 bytes
};

void activation_backward(const ActivationBackward& request, uintptr_t stream);

std::vector<Kernel> linear_kernels();
std::vector<Kernel> activation_backward_kernels();

}  // namespace fastattn
