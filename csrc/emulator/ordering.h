// Which accesses happen before which.
//
// Only barriers order memory: warp_barrier the lanes of a warp, the others also warps. Clocks are kept per warp, since whole
// warps arrive at barriers. An access carries its thread and the time of that thread's warp. Arriving at a barrier releases what
// the warp has done and knows of up to now, and starts a new time; passing it acquires what the others have released. Shuffles,
// votes, ldmatrix and mma make lanes meet but do not order their memory.
#pragma once

#include "machine.h"

namespace fastattn::emulator {

// The last writer of a byte of shared memory or of an element of global memory.
struct Written {
  uint32_t time;
  uint16_t thread;
  bool in_flight;  // by cp.async
};

inline uint32_t now() { return current_warp().time; }
inline bool in_this_block(uint32_t time) { return time >= machine.block_began; }

// Whether an access of this block has happened before what the current thread, or its whole warp, does now.
inline bool ordered(uint32_t time, int warp) {
  return warp == machine.thread / LANES ? time < now() : time <= current_warp().known[warp];
}
inline bool written_before(const Written& written, bool whole_warp) {
  return (written.thread == machine.thread && !whole_warp) || ordered(written.time, written.thread / LANES);
}

// What a barrier passes from those that arrive to those that it lets go.
struct Released {
  uint32_t times[MAX_WARPS];
};

inline void release(Warp& warp, Released& released) {
  for (int w = 0; w < machine.warps; w++) {
    uint32_t time = &warp == &warps[w] ? warp.time : warp.known[w];
    if (released.times[w] < time) released.times[w] = time;
  }
  warp.time = ++machine.clock;
}

inline void acquire(Warp& warp, const Released& released) {
  for (int w = 0; w < machine.warps; w++)
    if (warp.known[w] < released.times[w]) warp.known[w] = released.times[w];
}

}  // namespace fastattn::emulator
