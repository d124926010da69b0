// The request of the attention forward kernel, as plain data.
#pragma once

#include "../common/kernel.h"

#include <cstdint>

namespace fastattn {

// A (B, H, L, D) tensor of fp16 or bf16. Strides are in elements; the last is 1.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

struct AttentionForward {
  Heads q, k, v, out;  // q, out: L = M; k, v: L = N. out's rows start at multiples of 16 bytes.
  float* lse;          // (B, H, M)
  // Key j of sequence b is live where key_begin[b] <= j < key_end[b] and keys[b, j]; query i where i < query_end[b]. All may be
  // null.
  const int32_t* key_begin;
  const int32_t* key_end;
  const int32_t* query_end;
  const uint8_t* keys;
  int64_t keys_batch, keys_key;  // strides of keys
  bool causal;                   // j - i <= diagonal
  int diagonal;
  float scale;
  int B, H, M, N, D;
  bool bfloat16;
  bool aligned;  // rows of q, k and v start at multiples of 16 bytes
};

// Throws std::runtime_error with the kernel's name if it cannot be launched. D is 32, 64 or 128.
void attention_forward(const AttentionForward& request, uintptr_t stream);

std::vector<Kernel> attention_forward_kernels();

}  // namespace fastattn
