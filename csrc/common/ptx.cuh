// The one door to the hardware: every PTX instruction that a kernel uses, as a function, and the launch of a kernel.
//
// nvcc turns each into that instruction; g++ into a call of the emulator (csrc/emulator), which executes it lane by lane on a
// CPU. This is the only file that knows which of the two it is in. tests/emulator/conformance.cu runs each function on random
// data, so that a GPU and the emulator can be compared.
//
// Fragment layouts are those of the PTX ISA: in an m16n8 accumulator, lane l holds in d[0] and d[1] columns 2 (l % 4) and the
// next of row l / 4, in d[2] and d[3] the same columns of row l / 4 + 8.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {

// 16-bit elements, as bits: arithmetic is in fp32, after `to_float`, or in the tensor cores.
struct Half {
  static constexpr const char* NAME = "Half";
  uint16_t bits;
};
struct Bfloat16 {
  static constexpr const char* NAME = "Bfloat16";
  uint16_t bits;
};

// Where a launch goes. `blocks` lie on the grid's first axis; `shared_bytes` of dynamic shared memory each.
struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  uintptr_t stream;
};

}  // namespace fastattn

#ifndef __CUDACC__
#include "../emulator/emulator.h"
#else
#include "launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define KERNEL(threads, blocks_per_multiprocessor) __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define KERNEL_ARGUMENT const __grid_constant__
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace fastattn {

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Matrix products: d += a b. a is 16 x 16 (16 x 8 with k8), b 16 x 8 (8 x 8), d 16 x 8 in fp32.

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
DEVICE void mma_m16n8k16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

template <>
DEVICE void mma_m16n8k8<Half>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

template <>
DEVICE void mma_m16n8k8<Bfloat16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + r gives the address of row r of matrix i, which must
// be a multiple of 16 bytes. Lane l receives in r[i] elements 2 (l % 4) and the next of row l / 4, or with `trans` of column l
// / 4.

DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asynchronous copies to shared memory: 16 bytes, of which the first `bytes` (0 to 16) are read and the rest is zero. Both
// addresses must be multiples of 16. The data is there after `cp_async_wait` and, for other threads, a barrier.

DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of the groups that this thread has committed are still under way.
template <int PENDING>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Exchange within a warp: all 32 lanes take part.

template <class V>
DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class V>
DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class V>
DEVICE V shuffle_up(V value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
template <class V>
DEVICE V shuffle_down(V value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}
DEVICE uint32_t vote_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEVICE bool vote_any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
DEVICE bool vote_all(bool predicate) { return __all_sync(0xffffffffu, predicate); }

// Barriers: of the block, of a warp, and named ones (1 to 15) among `threads` threads, a multiple of 32.

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Conversions, to nearest even unless said otherwise.

DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
DEVICE Bfloat16 from_float<Bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two elements in a register, `low` in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// fp32 to tf32, to nearest, ties away from zero.
DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// 2^x, to 2 ulp; subnormal results are 0.
DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastattn
#endif
