// The gradient that enters a linear layer's products, dz = dy activation'(z), and in the same pass the bias gradient's sums.
//
// Tile plan: a block of 256 threads takes 64 columns of one run of rows; a thread 8 columns of every 32nd row. Sums are kept in
// registers, added over the 32 rows of threads in shared memory in a fixed order, and written as one row of `sums` per run: no
// atomics, so the result is the same in every launch. The caller adds the `splits` rows.
//
// Bytes per element: 2 for dy, 2 for z, 2 for dz; without an activation 2 for dy alone.
#include "linear.h"

#include "activation.cuh"
#include "vectors.cuh"

namespace fastattn {
namespace {

constexpr int COLUMNS = 64, THREADS = 256, LANES = COLUMNS / 8, ROWS = THREADS / LANES;
constexpr int SHARED_BYTES = ROWS * COLUMNS * 4;

template <class T>
KERNEL(THREADS, 4)
activation_backward_kernel(KERNEL_ARGUMENT ActivationBackward p) {
  SHARED_MEMORY(shared);
  int blocks = (p.F + COLUMNS - 1) / COLUMNS, split = blockIdx.x / blocks;
  int row = threadIdx.x / LANES, lane_column = threadIdx.x % LANES * 8;
  int column = static_cast<int>(blockIdx.x % blocks) * COLUMNS + lane_column, count = max(min(p.F - column, 8), 0);
  int64_t run = (p.rows + p.splits - 1) / p.splits, end = min(p.rows, (split + 1) * run);

  float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t m = split * run + row; m < end && count > 0; m += ROWS) {
    float dz[8];
    load_8(dz, static_cast<const T*>(p.dy) + m * p.dy_row + column, count, p.vectors);
    if (p.z != nullptr) {
      float z[8];
      int64_t at = m * p.F + column;
      load_8(z, static_cast<const T*>(p.z) + at, count, p.vectors);
#pragma unroll
      for (int e = 0; e < 8; e++) dz[e] *= derivative(p.activation, z[e]);
      store_8(static_cast<T*>(p.dz) + at, dz, count, p.vectors);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) total[e] += dz[e];
  }
  if (p.sums == nullptr) return;
  float* totals = reinterpret_cast<float*>(shared);  // (ROWS, COLUMNS)
  store_8(totals + row * COLUMNS + lane_column, total, 8, true);
  block_barrier();
  int sum_column = static_cast<int>(blockIdx.x % blocks) * COLUMNS + threadIdx.x;
  if (threadIdx.x < COLUMNS && sum_column < p.F) {
    float sum = 0;
    for (int r = 0; r < ROWS; r++) sum += totals[r * COLUMNS + threadIdx.x];
    p.sums[static_cast<int64_t>(split) * p.F + sum_column] = sum;
  }
}

template <class T>
const Kernel KERNEL_INFO{"activation_backward_kernel<" + std::string(T::NAME) + ">", THREADS, SHARED_BYTES};

template <class T>
void start(const ActivationBackward& p, uintptr_t stream) {
  int64_t blocks = static_cast<int64_t>((p.F + COLUMNS - 1) / COLUMNS) * p.splits;
  launch<activation_backward_kernel<T>>(KERNEL_INFO<T>.name.c_str(), {blocks, THREADS, SHARED_BYTES, stream}, p);
}

}  // namespace

void activation_backward(const ActivationBackward& p, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, stream) : start<Half>(p, stream);
}

std::vector<Kernel> activation_backward_kernels() { return {KERNEL_INFO<Half>, KERNEL_INFO<Bfloat16>}; }

}  // namespace fastattn
