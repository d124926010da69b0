// Threads are fibers: a stack each, switched by hand. One runs until it has to wait for others, then the next that can run does.
#include <sys/mman.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "machine.h"

fastattn::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

// Saves what a callee must preserve on the present stack, leaves its pointer in *from, and takes the same up from `to`.
extern "C" __attribute__((visibility("hidden"))) void fastattn_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden fastattn_emulator_switch
.globl fastattn_emulator_switch
.type fastattn_emulator_switch, @function
fastattn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_emulator_switch, . - fastattn_emulator_switch
)");

namespace fastattn::emulator {

Machine machine;
Fiber fibers[MAX_THREADS];
Warp warps[MAX_WARPS];

namespace {

constexpr size_t PAGE = 4096;
constexpr int SAVED_REGISTERS = 6;
void* scheduler_stack_pointer;

// A stack is mapped once, with a page below it that stops an overflow, and used again by every block.
uintptr_t map_stack() {
  void* memory = mmap(nullptr, PAGE + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE) != 0)
    throw std::runtime_error("emulator: no memory for a thread's stack");
  return reinterpret_cast<uintptr_t>(memory) + PAGE;
}

[[noreturn]] void switch_for_good(void* stack_pointer) {
  void* never_used;
  fastattn_emulator_switch(&never_used, stack_pointer);
  __builtin_unreachable();
}

int next_runnable() {
  int first = machine.thread / LANES;
  for (int i = 0; i < machine.warps; i++) {
    int warp = first + i < machine.warps ? first + i : first + i - machine.warps;
    if (warps[warp].runnable) return warp * LANES + __builtin_ctz(warps[warp].runnable);
  }
  return -1;
}

void take_turn(int thread) {
  machine.thread = thread;
  machine.stack = fibers[thread].stack;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
}

void* next_stack_pointer() {
  int thread = next_runnable();
  if (thread < 0) return scheduler_stack_pointer;
  take_turn(thread);
  return fibers[thread].stack_pointer;
}

[[noreturn]] void run_thread() {
  machine.entry(machine.arguments);
  Warp& warp = current_warp();
  uint32_t bit = 1u << machine.thread % LANES;
  check_copies_after_exit(fibers[machine.thread]);
  warp.runnable &= ~bit;
  warp.exited |= bit;
  if (warp.arrived) require_whole_warp(warp);
  if (warp.exited == ALL_LANES) warp_exited();
  switch_for_good(next_stack_pointer());
}

// The stack looks as if `run_thread` were about to be returned to, by a switch. A function starts with its return address on top
// of the stack, 8 bytes off a multiple of 16.
void prepare_thread(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = map_stack();
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < SAVED_REGISTERS; i++) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.copies.clear();
  fiber.groups = 0;
}

void report_deadlock() {
  std::string stuck;
  Site first{};
  for (int w = 0; w < machine.warps; w++) {
    if (warps[w].exited == ALL_LANES) continue;
    int lane = __builtin_ctz(~warps[w].exited);
    const Fiber& fiber = fibers[w * LANES + lane];
    if (stuck.empty()) {
      first = fiber.waits_at;
      machine.thread = w * LANES + lane;
    }
    stuck += (stuck.empty() ? "warp " : ", warp ") + std::to_string(w) + " waits in " + fiber.waits_in + " at " +
             line_of(fiber.waits_at);
  }
  report("deadlock", first, "no thread can go on: %s", stuck.c_str());
}

void run_block(int64_t block) {
  machine.block = block;
  machine.block_began = ++machine.clock;
  machine.live_warps = machine.warps;
  blockIdx = {static_cast<unsigned>(block), 0, 0};
  for (int w = 0; w < machine.warps; w++) {
    Warp& warp = warps[w];
    warp.runnable = ALL_LANES;
    warp.exited = warp.arrived = 0;
    warp.time = machine.block_began;
    for (int other = 0; other < machine.warps; other++) warp.known[other] = machine.block_began - 1;
  }
  for (int t = 0; t < machine.threads; t++) prepare_thread(fibers[t]);
  reset_shared();
  reset_barriers();
  take_turn(0);
  fastattn_emulator_switch(&scheduler_stack_pointer, fibers[0].stack_pointer);
  if (machine.abandoned) return;
  if (machine.live_warps > 0) {
    report_deadlock();
    machine.abandoned = true;
    return;
  }
  check_barriers_after_block();
}

}  // namespace

void wait_for_wake(const char* in, Site at) {
  Fiber& fiber = fibers[machine.thread];
  fiber.waits_in = in;
  fiber.waits_at = at;
  current_warp().runnable &= ~(1u << machine.thread % LANES);
  fastattn_emulator_switch(&fiber.stack_pointer, next_stack_pointer());
}

void wake(Warp& warp) { warp.runnable = ALL_LANES; }

void abandon() {
  machine.abandoned = true;
  switch_for_good(scheduler_stack_pointer);
}

void launch(const char* name, const Launch& where, void (*kernel)(const void*), const void* arguments, size_t argument_bytes) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  auto refuse = [name](const char* why) { throw std::runtime_error(std::string(name) + ": " + why); };
  if (where.blocks < 0) refuse("a negative number of blocks");
  if (where.blocks > INT32_MAX) refuse("more than 2^31 - 1 blocks");
  if (where.threads <= 0 || where.threads > MAX_THREADS) refuse("a block has 1 to 1024 threads");
  if (where.threads % LANES) refuse("the emulator runs whole warps; the number of threads must be a multiple of 32");
  if (where.shared_bytes < 0 || where.shared_bytes > MAX_SHARED_BYTES) refuse("a block has at most 227 KB of shared memory");
  if (machine.abandoned) return;
  machine.kernel = name;
  machine.entry = kernel;
  machine.arguments = arguments;
  machine.argument_bytes = argument_bytes;
  machine.threads = where.threads;
  machine.warps = where.threads / LANES;
  machine.shared_bytes = where.shared_bytes;
  gridDim = {static_cast<unsigned>(where.blocks), 1, 1};
  blockDim = {static_cast<unsigned>(where.threads), 1, 1};
  machine.launch_began = ++machine.clock;
  machine.running = true;
  for (int64_t block = 0; block < where.blocks && !machine.abandoned; block++) run_block(block);
  machine.running = false;
}

}  // namespace fastattn::emulator
