// The request of the attention backward kernels, as plain data.
#pragma once

#include "../common/kernel.h"
#include "mask.h"

#include <cstdint>

namespace fastattn {

struct AttentionBackward {
  Heads q, k, v, out, dout;     // q, out, dout: (B, H, M, D); k, v: (B, Hkv, N, D)
  Heads dq, dk, dv;             // as q and k; rows start at multiples of 16 bytes
  const float* lse;             // (B, H, M)
  int64_t lse_batch, lse_head;  // strides of lse, and of dlse and delta
  const float* dlse;            // (B, H, M) or null
  float* delta;                 // (B, H, M), workspace of the two kernels: rowsum(dO * O) - dlse; null for the single one
  Mask mask;
  float scale;
  int B, H, Hkv, M, N, D;  // query head h reads head h / (H / Hkv) of k and v
                           // packed: B sequences of at most M queries and N keys, and strides of the batch are 0
  bool bfloat16;
  bool aligned;  // rows of q, k, v, out and dout start at multiples of 16 bytes
};

// Both throw std::runtime_error with the kernel's name if it cannot be launched. D is 32, 64 or 128.
void attention_backward_single(const AttentionBackward& request, uintptr_t stream);  // at most 256 keys, or 128 where D is 128
void attention_backward(const AttentionBackward& request, uintptr_t stream);         // one kernel for dq, one for dk and dv

std::vector<Kernel> attention_backward_single_kernels();
std::vector<Kernel> attention_backward_kernels();

}  // namespace fastattn
