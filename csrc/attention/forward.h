// The request of the attention forward, as plain data, and how it is cut into blocks of threads.
#pragma once

#include "../common/kernel.h"
#include "mask.h"

#include <cstdint>

namespace fastattn {

struct AttentionForward {
  Heads q, k, v, out;           // q, out: (B, H, M, D); k, v: (B, Hkv, N, D). out's rows start at multiples of 16 bytes.
  float* lse;                   // (B, H, M)
  int64_t lse_batch, lse_head;  // its strides
  Mask mask;
  float scale;
  int B, H, Hkv, M, N, D;  // query head h reads head h / (H / Hkv) of k and v
                           // packed: B sequences of at most M queries and N keys, and strides of the batch are 0
  bool bfloat16;
  bool aligned;  // rows of q, k and v start at multiples of 16 bytes
};

// The two kernels: K and V of a head resident in shared memory with scores of `capacity` keys in registers, or, with a capacity
// of 0, K and V streaming through it by tiles.
struct AttentionForwardConfig {
  int capacity;
  int warps;
  int rows;  // queries of a block
  int shared_bytes;
};

// `shared_limit`: bytes that a block may ask for on the device.
AttentionForwardConfig attention_forward_config(int D, int M, int N, int shared_limit);

// A product that a warp makes: 16 queries from m on with 8 or 16 keys from n on; `masked`: pairs are looked at one by one.
struct AttentionForwardBlock {
  int b, h, m, n, keys;
  bool masked;
};

// All of them, by the code that the kernels run; the mask's tensors are on the CPU. Only the mask and the sizes are looked at.
std::vector<AttentionForwardBlock> attention_forward_blocks(const AttentionForward& request, int shared_limit);

// Throws std::runtime_error with the kernel's name if it cannot be launched. D is 32, 64 or 128.
void attention_forward(const AttentionForward& request, uintptr_t stream);

std::vector<Kernel> attention_forward_kernels();

// In forward_resident.cu and forward_streaming.cu.
void attention_forward_resident(const AttentionForward& request, const AttentionForwardConfig& config, uintptr_t stream);
void attention_forward_streaming(const AttentionForward& request, const AttentionForwardConfig& config, uintptr_t stream);
std::vector<Kernel> attention_forward_resident_kernels();
std::vector<Kernel> attention_forward_streaming_kernels();

}  // namespace fastattn
