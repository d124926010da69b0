// A seeded bug per kernel, and beside each its correction: `BUG` false. The report must name the line that is marked with the
// kernel's name. 64 threads write 64 of 70 words into 8 rows of 8 that lie 12 words apart.
#include <cstring>
#include <string>

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

using Start = void (*)(const char*, const Launch&, Arguments);

struct Entry {
  const char* name;
  int blocks;
  Start start[2];  // the correction, the bug
};

#define ENTRY(kernel, blocks)                                                              \
  {                                                                                        \
    #kernel, blocks, { launch<kernel<false>, Arguments>, launch<kernel<true>, Arguments> } \
  }

const Entry ENTRIES[] = {
    ENTRY(out_of_bounds_read, 1),
    ENTRY(wild_read, 1),
    ENTRY(wild_write, 1),
    ENTRY(write_into_gap, 1),
    ENTRY(memcpy_past_end, 1),
    ENTRY(write_to_input, 1),
    ENTRY(write_to_host_variable, 1),
    ENTRY(write_to_constant, 1),
    ENTRY(beyond_shared_memory, 1),
    ENTRY(uninitialised_shared, 1),
    ENTRY(uninitialised_output, 1),
    ENTRY(unwritten_output, 1),
    ENTRY(read_after_write, 1),
    ENTRY(write_after_read, 1),
    ENTRY(write_after_write, 1),
    ENTRY(missing_warp_barrier, 1),
    ENTRY(ldmatrix_without_barrier, 1),
    ENTRY(write_after_ldmatrix, 1),
    ENTRY(write_after_two_reads, 1),
    ENTRY(copy_read_too_early, 1),
    ENTRY(copy_written_over, 1),
    ENTRY(copy_never_waited_for, 1),
    ENTRY(copy_into_what_others_read, 1),
    ENTRY(copy_past_end, 1),
    ENTRY(divergent_shuffle, 1),
    ENTRY(divergent_block_barrier, 1),
    ENTRY(lanes_have_left, 1),
    ENTRY(lanes_left_before, 1),
    ENTRY(deadlock, 1),
    ENTRY(misaligned_load, 1),
    ENTRY(misaligned_store, 1),
    ENTRY(misaligned_scalar, 1),
    ENTRY(misaligned_row, 1),
    ENTRY(misaligned_copy, 1),
    ENTRY(barrier_thread_count, 1),
    ENTRY(barrier_number, 1),
    ENTRY(barrier_arrived_at_twice, 1),
    ENTRY(barrier_left_incomplete, 1),
    ENTRY(pipeline_overruns, 1),
    ENTRY(arrival_does_not_wait, 1),
    ENTRY(blocks_overlap, 2),
    ENTRY(warp_leaves_early, 1),
};

}  // namespace
}  // namespace fastattn

// Launches a kernel, with its bug or without. Returns null, or what the launch was refused for.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, int bug, const uint32_t* input,
                                                                  uint32_t* output, int threads) {
  static std::string error;
  using namespace fastattn;
  try {
    for (const Entry& e : ENTRIES)
      if (std::strcmp(name, e.name) == 0) {
        e.start[bug](e.name, {e.blocks, threads, SHARED_BYTES, 0}, {input, output});
        return nullptr;
      }
    throw std::runtime_error("no such kernel");
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}
