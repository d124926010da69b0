// Kernels with a seeded bug, and beside each its correction: `BUG` false. The report must name the line that is marked with the
// kernel's name. 64 threads write 64 of 70 words into 8 rows of 8 that lie 12 words apart.
//
// Here: accesses that are wrong whatever other threads do: out of bounds, uninitialised, misaligned, missing.
#pragma once

#include <cstring>

#include "common/ptx.cuh"

namespace fastattn {
namespace {

constexpr int THREADS = 64, INPUTS = 70, ROW = 8, STRIDE = 12, SHARED_BYTES = 2048;

struct Arguments {
  const uint32_t* input;
  uint32_t* output;
};

DEVICE void put(const Arguments& p, int i, uint32_t value) { p.output[i / ROW * STRIDE + i % ROW] = value; }

template <bool BUG>
KERNEL(THREADS, 1)
out_of_bounds_read(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  uint32_t value = p.input[t + INPUTS - THREADS + (BUG ? 1 : 0)];  // out_of_bounds_read
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
wild_read(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  const uint32_t* from = BUG && t == 40 ? reinterpret_cast<const uint32_t*>(-uintptr_t{4}) : p.input + t;
  uint32_t value = *from;  // wild_read
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
wild_write(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  uint32_t* to = BUG && t == 40 ? reinterpret_cast<uint32_t*>(uintptr_t{16}) : p.output + t / ROW * STRIDE + t % ROW;
  *to = p.input[t];  // wild_write
}

template <bool BUG>
KERNEL(THREADS, 1)
write_into_gap(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, p.input[t]);
  if (BUG && t == 3) p.output[ROW] = 0;  // write_into_gap
}

template <bool BUG>
KERNEL(THREADS, 1)
memcpy_past_end(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  constexpr int WORDS = BUG ? ROW + 1 : ROW;
  if (t % ROW == 0) std::memcpy(p.output + t / ROW * STRIDE, p.input + t, 4 * WORDS);  // memcpy_past_end
}

template <bool BUG>
KERNEL(THREADS, 1)
write_to_input(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, p.input[t]);
  if (BUG) const_cast<uint32_t*>(p.input)[t] = 0;  // write_to_input
}

volatile uint32_t variable_of_the_host;
const uint32_t CONSTANTS[] = {2, 3, 5, 7, 11, 13, 17, 19};

template <bool BUG>
KERNEL(THREADS, 1)
write_to_host_variable(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, CONSTANTS[p.input[t] % 8]);
  if (BUG) variable_of_the_host = p.input[t];  // write_to_host_variable
}

template <bool BUG>
KERNEL(THREADS, 1)
write_to_constant(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, CONSTANTS[p.input[t] % 8]);
  if (BUG) const_cast<uint32_t*>(CONSTANTS)[p.input[t] % 8] = 0;  // write_to_constant
}

template <bool BUG>
KERNEL(THREADS, 1)
beyond_shared_memory(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  int byte = BUG ? SHARED_BYTES - 8 * THREADS + 12 * t : 4 * t;
  *reinterpret_cast<uint32_t*>(shared + byte) = p.input[t];  // beyond_shared_memory
  put(p, t, *reinterpret_cast<uint32_t*>(shared + byte));
}

template <bool BUG>
KERNEL(THREADS, 1)
uninitialised_shared(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  if (!BUG || t != 17) values[t] = p.input[t];
  put(p, t, values[t]);  // uninitialised_shared
}

template <bool BUG>
KERNEL(THREADS, 1)
uninitialised_output(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (!BUG) put(p, t, p.input[t]);
  uint32_t before = p.output[t / ROW * STRIDE + t % ROW];  // uninitialised_output
  put(p, t, before + 1);
}

template <bool BUG>
KERNEL(THREADS, 1)
unwritten_output(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (!BUG || t != 42) put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
copy_past_end(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  if (t < 18) cp_async_16(shared + 16 * t, p.input + 4 * t, BUG || t < 17 ? 16 : 8);  // copy_past_end
  cp_async_commit();
  cp_async_wait<0>();
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
misaligned_load(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  uint2 pair = *reinterpret_cast<const uint2*>(p.input + (BUG ? t % 62 : t % 62 / 2 * 2));  // misaligned_load
  put(p, t, pair.x);
}

template <bool BUG>
KERNEL(THREADS, 1)
misaligned_store(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  *reinterpret_cast<uint4*>(shared + 16 * t + (BUG ? 8 : 0)) = uint4{p.input[t], 0, 0, 0};  // misaligned_store
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
misaligned_scalar(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(p.input) + 4 * (t % 63) + (BUG ? 2 : 0);
  uint32_t value = *reinterpret_cast<const uint32_t*>(bytes);  // misaligned_scalar
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
misaligned_row(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  for (int i = t; i < SHARED_BYTES / 4; i += THREADS) reinterpret_cast<uint32_t*>(shared)[i] = 0;
  block_barrier();
  uint32_t r[2];
  ldmatrix_x2(r, shared + (BUG ? 8 : 16) * (t % 32));  // misaligned_row
  put(p, t, r[0] + p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
misaligned_copy(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  cp_async_16(shared + 16 * t, p.input + (BUG ? t % 60 : t / 4 * 4), 16);  // misaligned_copy
  cp_async_commit();
  cp_async_wait<0>();
  put(p, t, p.input[t]);
}

}  // namespace
}  // namespace fastattn
