// A linear layer in one kernel: z = x W^T + b, y = activation(z) + residual, on mma.sync, for sm_80 and up.
//
// Tile plan: a block of 4 warps makes 128 x 128 elements of y, 64 x 64 a warp in 128 accumulators a thread, over K in steps of 32
// that come through four stages of asynchronous copies (64 KB of shared memory). Both operands are K-contiguous, as PyTorch
// stores them. The epilogue goes by strips of 16 rows through a warp's own shared memory, so that bias, residual, z and y move in
// 16-byte accesses.
//
// Bytes from L2: x once per 128 outputs, W once per 128 rows: K (1 / 128 + 1 / 128) 2 bytes per element of y, and 2 for y, 2 each
// for z and the residual where there are any. MMA: 2 K FLOPs per element, with rows, F rounded up to 128 and K to 32. All
// arithmetic of the epilogue is fp32; z and y are each rounded once.
#include "linear.h"

#include "../common/tile.cuh"
#include "activation.cuh"
#include "vectors.cuh"

namespace fastattn {
namespace {

constexpr int BLOCK_M = 128, BLOCK_N = 128, BLOCK_K = 32, STAGES = 4, THREADS = 128;
constexpr int WARP_M = 64, WARP_N = 64;            // a warp's part of the block's tile; the warps stand 2 x 2
constexpr int STRIP_ROW = WARP_N + 4;              // floats; the 4 spread the rows of a strip over the banks
constexpr int TILE_BYTES = BLOCK_M * BLOCK_K * 2;  // of x, and as many of W
constexpr int SHARED_BYTES = STAGES * 2 * TILE_BYTES;
static_assert(4 * 16 * STRIP_ROW * 4 <= SHARED_BYTES, "a strip per warp in the memory of the stages");

using Accumulators = float[WARP_M / 16][WARP_N / 8][4];

// One step of 32 along K.
template <class T>
DEVICE void multiply(Accumulators& acc, const unsigned char* x_tile, const unsigned char* w_tile, int row, int column) {
  constexpr int CHUNKS = BLOCK_K / 8;
#pragma unroll
  for (int k = 0; k < BLOCK_K / 16; k++) {
    uint32_t a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++) load_a<CHUNKS>(a[i], x_tile, row + i * 16, k * 2);
#pragma unroll
    for (int j = 0; j < WARP_N / 16; j++) load_b<CHUNKS>(b[j], w_tile, column + j * 16, k * 2);
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
      for (int j = 0; j < WARP_N / 16; j++) {
        mma_m16n8k16<T>(acc[i][2 * j], a[i], {b[j][0], b[j][1]});
        mma_m16n8k16<T>(acc[i][2 * j + 1], a[i], {b[j][2], b[j][3]});
      }
  }
}

// Eight elements of z to z and y. `at`: index of the first in a contiguous (rows, F), `column` its column; `count` of them exist.
template <class T>
DEVICE void finish(const Linear& p, float (&z)[8], int64_t at, int column, int count) {
  float values[8];
  if (p.bias != nullptr) {
    if (p.wide_bias)
      load_8(values, static_cast<const float*>(p.bias) + column, count, false);
    else
      load_8(values, static_cast<const T*>(p.bias) + column, count, false);
#pragma unroll
    for (int e = 0; e < 8; e++) z[e] += values[e];
  }
  if (p.z != nullptr) store_8(static_cast<T*>(p.z) + at, z, count, p.vectors);
#pragma unroll
  for (int e = 0; e < 8; e++) z[e] = activate(p.activation, z[e]);
  if (p.residual != nullptr) {
    if (p.wide)
      load_8(values, static_cast<const float*>(p.residual) + at, count, p.vectors);
    else
      load_8(values, static_cast<const T*>(p.residual) + at, count, p.vectors);
#pragma unroll
    for (int e = 0; e < 8; e++) z[e] += values[e];
  }
  if (p.wide)
    store_8(static_cast<float*>(p.y) + at, z, count, p.vectors);
  else
    store_8(static_cast<T*>(p.y) + at, z, count, p.vectors);
}

// A warp's 64 x 64 accumulators, whose first element is (m0, n0) of y, by strips of 16 rows.
template <class T>
DEVICE void epilogue(const Linear& p, const Accumulators& acc, float* strip, int64_t m0, int n0) {
  int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
    for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<float2*>(strip + (row + half * 8) * STRIP_ROW + j * 8 + column) =
            float2{acc[i][j][half * 2], acc[i][j][half * 2 + 1]};
    warp_barrier();
#pragma unroll 1
    for (int pass = 0; pass < 4; pass++) {
      int r = pass * 4 + lane / 8, c = lane % 8 * 8, count = min(p.F - n0 - c, 8);
      int64_t m = m0 + i * 16 + r;
      if (m < p.rows && count > 0) {
        float z[8];
        load_8(z, strip + r * STRIP_ROW + c, 8, true);
        finish<T>(p, z, m * p.F + n0 + c, n0 + c, count);
      }
    }
    warp_barrier();
  }
}

template <class T>
KERNEL(THREADS, 2)
linear_kernel(KERNEL_ARGUMENT Linear p) {
  SHARED_MEMORY(shared);
  int columns = (p.F + BLOCK_N - 1) / BLOCK_N;
  int64_t m0 = static_cast<int64_t>(blockIdx.x / columns) * BLOCK_M;
  int n0 = static_cast<int>(blockIdx.x % columns) * BLOCK_N;
  const T* x = static_cast<const T*>(p.x) + m0 * p.x_row;
  const T* w = static_cast<const T*>(p.weight) + n0 * p.weight_row;
  int steps = (p.K + BLOCK_K - 1) / BLOCK_K;

  auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % STAGES * 2 * TILE_BYTES;
      int k0 = step * BLOCK_K;
      auto elements = [&](bool exists, int column) { return exists ? max(min(p.K - k0 - column, 8), 0) : 0; };
      load_tile<T, BLOCK_M, BLOCK_K, THREADS>(stage, x + k0, p.x_row, p.aligned,
                                              [&](int row, int column) { return elements(m0 + row < p.rows, column); });
      load_tile<T, BLOCK_N, BLOCK_K, THREADS>(stage + TILE_BYTES, w + k0, p.weight_row, p.aligned,
                                              [&](int row, int column) { return elements(n0 + row < p.F, column); });
    }
    cp_async_commit();
  };

  int warp = threadIdx.x / 32, row = warp / 2 * WARP_M, column = warp % 2 * WARP_N;
  Accumulators acc;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
    for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0;

  for (int step = 0; step < STAGES - 1; step++) load(step);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    block_barrier();          // this step's tiles are there, and all warps are done with those of the step before,
    load(step + STAGES - 1);  // whose place the next copy takes
    const unsigned char* stage = shared + step % STAGES * 2 * TILE_BYTES;
    multiply<T>(acc, stage, stage + TILE_BYTES, row, column);
  }
  cp_async_wait<0>();
  block_barrier();
  epilogue<T>(p, acc, reinterpret_cast<float*>(shared) + warp * 16 * STRIP_ROW, m0 + row, n0 + column);
}

template <class T>
const Kernel KERNEL_INFO{"linear_kernel<" + std::string(T::NAME) + ">", THREADS, SHARED_BYTES};

template <class T>
void start(const Linear& p, uintptr_t stream) {
  int64_t blocks = (p.rows + BLOCK_M - 1) / BLOCK_M * ((p.F + BLOCK_N - 1) / BLOCK_N);
  launch<linear_kernel<T>>(KERNEL_INFO<T>.name.c_str(), {blocks, THREADS, SHARED_BYTES, stream}, p);
}

}  // namespace

void linear(const Linear& p, uintptr_t stream) { p.bfloat16 ? start<Bfloat16>(p, stream) : start<Half>(p, stream); }

std::vector<Kernel> linear_kernels() { return {KERNEL_INFO<Half>, KERNEL_INFO<Bfloat16>}; }

}  // namespace fastattn
