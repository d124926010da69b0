// The library of seeded bugs: a table of the kernels, and the launch of one by its name.
#include <cstring>
#include <string>

#include "bugs_access.cuh"
#include "bugs_order.cuh"

namespace fastattn {
namespace {

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
