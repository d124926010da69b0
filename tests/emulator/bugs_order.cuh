// Kernels with a seeded bug, as in bugs_access.cuh: accesses and meetings of threads in a wrong order. Races, copies under way,
// divergence, deadlocks, barriers.
#pragma once

#include "bugs_access.cuh"

namespace fastattn {
namespace {

template <bool BUG>
KERNEL(THREADS, 1)
read_after_write(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  values[t] = p.input[t];
  if (!BUG) block_barrier();
  if (BUG) warp_barrier();           // orders the lanes of a warp only
  put(p, t, values[(t + 32) % 64]);  // read_after_write
}

template <bool BUG>
KERNEL(THREADS, 1)
write_after_read(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  values[t] = p.input[t];
  block_barrier();
  uint32_t value = values[63 - t];
  if (!BUG) block_barrier();
  values[t] = 0;  // write_after_read
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
write_after_write(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint16_t* values = reinterpret_cast<uint16_t*>(shared);
  int t = threadIdx.x;
  values[BUG ? t / 2 : t] = static_cast<uint16_t>(p.input[t]);  // write_after_write
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
missing_warp_barrier(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  values[t] = p.input[t];
  if (!BUG) warp_barrier();
  if (BUG) vote_any(true);   // a meeting, but no barrier
  put(p, t, values[t ^ 1]);  // missing_warp_barrier
}

template <bool BUG>
KERNEL(THREADS, 1)
ldmatrix_without_barrier(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  *reinterpret_cast<uint4*>(shared + 16 * t) = uint4{p.input[t], 0, 0, 0};
  if (!BUG) warp_barrier();
  uint32_t r[4];
  ldmatrix_x4(r, shared + 16 * t);  // ldmatrix_without_barrier
  put(p, t, r[0]);
}

// Each lane writes the row whose address it gave, but all lanes have read it.
template <bool BUG>
KERNEL(THREADS, 1)
write_after_ldmatrix(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  *reinterpret_cast<uint4*>(shared + 16 * t) = uint4{p.input[t], 0, 0, 0};
  warp_barrier();
  uint32_t r[4];
  ldmatrix_x4(r, shared + 16 * t);
  if (!BUG) warp_barrier();
  shared[16 * t] = 0;  // write_after_ldmatrix
  put(p, t, r[0]);
}

// A word that two lanes read, and the second of them writes.
template <bool BUG>
KERNEL(THREADS, 1)
write_after_two_reads(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  values[t] = p.input[t];
  warp_barrier();
  uint32_t value = values[t / 2 * 2];
  if (!BUG) warp_barrier();
  if (t % 2 == 1) values[t - 1] = 0;  // write_after_two_reads
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
copy_read_too_early(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  for (int stage = 0; stage < 2; stage++) {
    cp_async_16(shared + 1024 * stage + 16 * t, p.input + t / 4 * 4, 16);
    cp_async_commit();
  }
  cp_async_wait<1>();
  int stage = BUG ? 1 : 0;
  put(p, t, *reinterpret_cast<uint32_t*>(shared + 1024 * stage + 16 * t + t % 4 * 4));  // copy_read_too_early
  cp_async_wait<0>();
}

template <bool BUG>
KERNEL(THREADS, 1)
copy_written_over(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  cp_async_16(shared + 16 * t, p.input + t / 4 * 4, 16);
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  shared[16 * t] = 0;  // copy_written_over
  cp_async_wait<0>();
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
copy_never_waited_for(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  int t = threadIdx.x;
  cp_async_16(shared + 16 * t, p.input + t / 4 * 4, 16);  // copy_never_waited_for
  if (!BUG) cp_async_commit();
  cp_async_wait<0>();
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
copy_into_what_others_read(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  values[t] = p.input[t];
  block_barrier();
  put(p, t, values[63 - t]);
  if (!BUG) block_barrier();
  if (t < 16) cp_async_16(shared + 16 * t, p.input + 4 * t, 16);  // copy_into_what_others_read
  cp_async_commit();
  cp_async_wait<0>();
}

template <bool BUG>
KERNEL(THREADS, 1)
divergent_shuffle(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  uint32_t value = p.input[t];
  if (BUG && t % 32 < 16) value = shuffle_xor(value, 1);
  value = shuffle_xor(value, 1);  // divergent_shuffle
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
divergent_block_barrier(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (BUG && t < 32)
    block_barrier();
  else
    block_barrier();  // divergent_block_barrier
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
lanes_have_left(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, p.input[t]);
  if (t >= (BUG ? 16 : 32)) return;
  vote_any(t == 0);  // lanes_have_left
}

template <bool BUG>
KERNEL(THREADS, 1)
lanes_left_before(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  put(p, t, p.input[t]);
  if (t < (BUG ? 16 : 32)) return;
  vote_any(t == 0);  // lanes_left_before
}

template <bool BUG>
KERNEL(THREADS, 1)
deadlock(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (t < 32) named_barrier_sync(1, 64);  // deadlock
  if (t >= 32) named_barrier_sync(BUG ? 2 : 1, 64);
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
barrier_thread_count(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  named_barrier_sync(1, BUG ? 48 : 64);  // barrier_thread_count
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
barrier_number(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  named_barrier_sync(BUG ? 16 : 15, 64);  // barrier_number
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
barrier_arrived_at_twice(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (t < 32)
    for (int i = 0; i < (BUG ? 2 : 1); i++) named_barrier_arrive(1, 64);  // barrier_arrived_at_twice
  if (t >= 32) named_barrier_sync(1, 64);
  put(p, t, p.input[t]);
}

template <bool BUG>
KERNEL(THREADS, 1)
barrier_left_incomplete(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  if (t < 32) named_barrier_arrive(1, 64);  // barrier_left_incomplete
  if (!BUG && t >= 32) named_barrier_sync(1, 64);
  put(p, t, p.input[t]);
}

// Warp 0 fills two stages in turn, warp 1 empties them; with the bug it does not wait until a stage is empty.
template <bool BUG>
KERNEL(THREADS, 1)
pipeline_overruns(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  constexpr int FULL = 1, EMPTY = 3, ROUNDS = 6;
  int t = threadIdx.x, lane = t % 32;
  for (int round = 0; round < ROUNDS; round++) {
    int stage = round % 2;
    if (t < 32) {
      if (round >= 2) named_barrier_sync(EMPTY + stage, 64);
      values[stage * 32 + lane] = p.input[(lane + round) % 64];  // pipeline_overruns
      named_barrier_arrive(FULL + stage, 64);
    } else {
      if (BUG && round < ROUNDS - 2) named_barrier_arrive(EMPTY + stage, 64);
      named_barrier_sync(FULL + stage, 64);
      put(p, (round * 32 + lane) % 64, values[stage * 32 + 31 - lane]);
      if (!BUG && round < ROUNDS - 2) named_barrier_arrive(EMPTY + stage, 64);
    }
  }
}

// The barrier that is arrived at tells the other warp, not this one.
template <bool BUG>
KERNEL(THREADS, 1)
arrival_does_not_wait(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  uint32_t value = p.input[t];
  if (t < 32) values[t] = value;
  if (t < 32 || !BUG) named_barrier_sync(1, 64);
  if (t >= 32 && BUG) named_barrier_arrive(1, 64);
  if (t >= 32) value = values[t - 32];  // arrival_does_not_wait
  put(p, t, value);
}

template <bool BUG>
KERNEL(THREADS, 1)
blocks_overlap(KERNEL_ARGUMENT Arguments p) {
  int t = threadIdx.x;
  uint32_t* to = p.output + t / ROW * STRIDE + t % ROW;
  if (BUG || t / 32 == static_cast<int>(blockIdx.x)) *to = p.input[t];  // blocks_overlap
}

// Warps that have left are not waited for.
template <bool BUG>
KERNEL(THREADS, 1)
warp_leaves_early(KERNEL_ARGUMENT Arguments p) {
  SHARED_MEMORY(shared);
  uint32_t* values = reinterpret_cast<uint32_t*>(shared);
  int t = threadIdx.x;
  put(p, t, p.input[t]);
  if (t >= 32) return;
  values[t] = p.input[t];
  if (!BUG) block_barrier();
  put(p, t, values[31 - t]);  // warp_leaves_early
}

}  // namespace
}  // namespace fastattn
