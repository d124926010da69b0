// Barriers: whole warps arrive, as the `aligned` instructions of PTX demand.
#include "ordering.h"

namespace fastattn::emulator {
namespace {

struct Barrier {
  uint32_t arrived;  // a bit per warp
  uint32_t waiting;  // those of them that wait for the others
  int expected;      // warps
  Released released;
  Site site;  // of the first arrival
};

constexpr int NAMED_BARRIERS = 16;  // number 0 is the barrier of the block
Barrier barriers[NAMED_BARRIERS];

struct Arrival {
  int id, threads;
  Site site;
};

int number_of(const Warp& warp) { return static_cast<int>(&warp - warps); }

// What each has released becomes known to those that wait, and they go on.
bool complete_if_all_are_there(Barrier& barrier) {
  if (__builtin_popcount(barrier.arrived) != barrier.expected) return false;
  for (int w = 0; w < machine.warps; w++)
    if (barrier.waiting >> w & 1) {
      acquire(warps[w], barrier.released);
      wake(warps[w]);
    }
  barrier = {};
  return true;
}

bool arrive(Warp& warp, Barrier& barrier, int expected, bool wait, Site site) {
  if (!barrier.arrived) barrier.site = site;
  barrier.expected = expected;
  release(warp, barrier.released);
  barrier.arrived |= 1u << number_of(warp);
  if (wait) barrier.waiting |= 1u << number_of(warp);
  return complete_if_all_are_there(barrier) || !wait;
}

// Warps that have left the kernel are not waited for.
bool execute_block_barrier(Warp& warp) {
  Site site = warp.site;
  Barrier& barrier = barriers[0];
  if (barrier.arrived && (barrier.site.line != site.line || barrier.site.file != site.file)) {
    report("divergent", site, "block_barrier, while another warp of the block waits in the one at %s",
           line_of(barrier.site).c_str());
    abandon();
  }
  return arrive(warp, barrier, machine.live_warps, true, site);
}

bool execute_warp_barrier(Warp& warp) {
  warp.time = ++machine.clock;
  return true;
}

void check_arrival(const Warp& warp, const Arrival& arrival) {
  auto misuse = [&](const char* what, int value) {
    report("barrier", arrival.site, "named barrier %d: %s %d", arrival.id, what, value);
    abandon();
  };
  if (arrival.id < 1 || arrival.id >= NAMED_BARRIERS) misuse("numbers are 1 to 15, not", arrival.id);
  if (arrival.threads <= 0 || arrival.threads % LANES || arrival.threads > machine.threads)
    misuse("the number of threads must be a multiple of 32 within the block, not", arrival.threads);
  for (int lane = 0; lane < LANES; lane++) {
    const Arrival& other = *static_cast<const Arrival*>(warp.operands[lane]);
    if (other.id != arrival.id || other.threads != arrival.threads)
      misuse("another number or thread count is asked for by lane", lane);
  }
  const Barrier& barrier = barriers[arrival.id];
  if (barrier.arrived && barrier.expected != arrival.threads / LANES)
    misuse("earlier arrivals asked for another thread count than", arrival.threads);
  if (barrier.arrived >> number_of(warp) & 1) misuse("arrived at twice before it is complete, by warp", number_of(warp));
}

template <bool wait>
bool execute_named_barrier(Warp& warp) {
  const Arrival arrival = *static_cast<const Arrival*>(warp.operands[0]);
  check_arrival(warp, arrival);
  return arrive(warp, barriers[arrival.id], arrival.threads / LANES, wait, arrival.site);
}

}  // namespace

void block_barrier(Site site) { meet("block_barrier", site, nullptr, execute_block_barrier); }

void warp_barrier(Site site) { meet("warp_barrier", site, nullptr, execute_warp_barrier); }

void named_barrier_sync(int id, int threads, Site site) {
  Arrival arrival{id, threads, site};
  meet("named_barrier_sync", site, &arrival, execute_named_barrier<true>);
}

void named_barrier_arrive(int id, int threads, Site site) {
  Arrival arrival{id, threads, site};
  meet("named_barrier_arrive", site, &arrival, execute_named_barrier<false>);
}

void reset_barriers() {
  for (Barrier& barrier : barriers) barrier = {};
}

void warp_exited() {
  machine.live_warps--;
  Barrier& barrier = barriers[0];
  barrier.expected = machine.live_warps;
  if (barrier.arrived) complete_if_all_are_there(barrier);
}

void check_barriers_after_block() {
  for (int id = 1; id < NAMED_BARRIERS; id++)
    if (barriers[id].arrived)
      report("barrier", barriers[id].site, "named barrier %d: the block ended when %d of %d warps had arrived", id,
             __builtin_popcount(barriers[id].arrived), barriers[id].expected);
}

}  // namespace fastattn::emulator
