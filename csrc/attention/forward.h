// The request of the attention forward kernel, as plain data.
#pragma once

#include "../common/kernel.h"
#include "mask.h"

#include <cstdint>

namespace fastattn {

struct AttentionForward {
  Heads q, k, v, out;  // q, out: (B, H, M, D); k, v: (B, Hkv, N, D). out's rows start at multiples of 16 bytes.
  float* lse;          // (B, H, M)
  Mask mask;
  float scale;
  int B, H, Hkv, M, N, D;  // query head h reads head h / (H / Hkv) of k and v
  bool bfloat16;
  bool aligned;  // rows of q, k and v start at multiples of 16 bytes
};

// Throws std::runtime_error with the kernel's name if it cannot be launched. D is 32, 64 or 128.
void attention_forward(const AttentionForward& request, uintptr_t stream);

std::vector<Kernel> attention_forward_kernels();

}  // namespace fastattn
