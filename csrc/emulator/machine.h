// The emulated multiprocessor: one block at a time, its threads, and the rules that the files beside this one enforce.
//
// fibers.cpp       stacks and turns; the run of a launch, block after block
// collectives.cpp  meetings of a warp: shuffles, votes, ldmatrix, mma
// barriers.cpp     barriers of warp and block, named barriers
// ordering.h       which accesses happen before which
// shared.cpp       shared memory and cp.async
// views.cpp        global memory: the views that are watched
// hooks.cpp        loads and stores of the kernel
// reports.cpp      what was found
//
// A kernel may access its own stack, the shared memory it asked for, the elements of watched views, and read its arguments and
// its library's constants. After an access elsewhere, a misaligned one, divergence or a deadlock, there is nothing to go on from:
// the launch is abandoned there, and so is every later one until the session ends. After anything else the launch goes on.
//
// Not seen: a race in global memory in which the read comes first; a source of cp.async that is overwritten before the wait; an
// access to the wrong one of two views that share memory; uninitialised registers; loads and stores of whole structs of 16 bytes
// that need only 8-byte alignment count as misaligned at odd multiples of 8. And what only a GPU has: the text of an asm
// statement, the order in which a matrix product rounds, approximate functions, the memory model short of a barrier, registers,
// time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/ptx.cuh"

#pragma GCC visibility push(hidden)
namespace fastattn::emulator {

constexpr int LANES = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / LANES;
constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr size_t STACK_BYTES = 128 * 1024;

struct Copy {  // by cp.async
  unsigned char* to;
  const void* from;
  int bytes;
  int group;
  Site site;
};

struct Fiber {
  void* stack_pointer;
  uintptr_t stack;  // lowest address
  const char* waits_in;
  Site waits_at;
  std::vector<Copy> copies;  // under way, in order
  int groups;                // committed
};

struct Warp {
  uint32_t runnable;  // a bit per lane
  uint32_t exited;
  uint32_t arrived;  // at the meeting under way, which is `collective` called at `site`
  const char* collective;
  Site site;
  void* operands[LANES];
  uint32_t time;              // of the warp's clock, see ordering.h
  uint32_t known[MAX_WARPS];  // the last time of each other warp that this one has synchronised with
};

struct Machine {
  // The launch.
  bool running;
  bool abandoned;
  const char* kernel;
  void (*entry)(const void*);
  const void* arguments;
  size_t argument_bytes;
  int threads, warps, shared_bytes;
  // The block.
  int64_t block;
  int live_warps;
  // The thread whose turn it is.
  int thread;
  uintptr_t stack;
  // Ticks of all clocks, which never go back within a session: blocks and launches are told apart by the time they began.
  uint32_t clock, launch_began, block_began;
};

extern Machine machine;
extern Fiber fibers[MAX_THREADS];
extern Warp warps[MAX_WARPS];
extern unsigned char* const shared;

inline Warp& current_warp() { return warps[machine.thread / LANES]; }

// fibers.cpp
void wait_for_wake(const char* in, Site at);
void wake(Warp& warp);
[[noreturn]] void abandon();

// collectives.cpp: `execute` is called by the last lane to arrive and says whether the warp may go on; if not, someone wakes it.
void meet(const char* collective, Site site, void* operands, bool (*execute)(Warp&));
void require_whole_warp(const Warp& warp);

// barriers.cpp
void reset_barriers();
void warp_exited();
void check_barriers_after_block();

// shared.cpp
void reset_shared();
bool in_shared(uintptr_t address);
void access_shared(uintptr_t address, size_t bytes, bool write, bool whole_warp, Site site);
void check_copies_after_exit(const Fiber& fiber);
void forget_accesses();

// views.cpp
void access_global(uintptr_t address, size_t bytes, bool write, Site site);
void check_unwritten();
void forget_views();

// hooks.cpp
void access(uintptr_t address, size_t bytes, bool write, Site site);

// reports.cpp
void report(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string line_of(Site site);

}  // namespace fastattn::emulator
#pragma GCC visibility pop
