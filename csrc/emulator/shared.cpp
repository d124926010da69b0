// Shared memory and cp.async.
//
// Every byte remembers its last writer and, for each warp, the last read. With warp clocks (ordering.h) that is enough to find
// each race between an access and the ones before it. A byte is uninitialised until something of this block has written it.
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "ordering.h"

namespace fastattn::emulator {
namespace {

constexpr size_t CAPACITY = (MAX_SHARED_BYTES + 4095) / 4096 * 4096;
constexpr size_t ALIGNMENT = 128;  // of what SHARED_MEMORY declares, and no more than that
constexpr uint8_t SEVERAL_LANES = 0xff;

// The reads of one warp: the time of the last for each byte, and the lane that made it.
struct Reads {
  uint32_t time[CAPACITY];
  uint8_t lane[CAPACITY];
};

// Zero pages that take up memory only where they are used.
template <class T>
T* map_zeros(size_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for shared memory");
  return static_cast<T*>(memory);
}

Written* const written = map_zeros<Written>(CAPACITY);
Reads* const reads = map_zeros<Reads>(MAX_WARPS);

bool same(const Written& a, const Written& b) { return a.time == b.time && a.thread == b.thread && a.in_flight == b.in_flight; }

// The checks of one byte. They return whether it is in order, so that an access is reported once.

bool may_read(size_t byte, bool whole_warp, Site site) {
  const Written& last = written[byte];
  if (!in_this_block(last.time))
    report("uninitialised read", site, "byte %zu of shared memory is read before anything is written to it", byte);
  else if (last.in_flight)
    report("in flight", site, "byte %zu of shared memory is read while a cp_async_16 of thread %d to it is not waited for", byte,
           last.thread);
  else if (!written_before(last, whole_warp))
    report("race", site, "byte %zu of shared memory is read after thread %d wrote it, with no barrier between", byte,
           last.thread);
  else
    return true;
  return false;
}

bool may_write(size_t byte, Site site) {
  const Written& last = written[byte];
  if (in_this_block(last.time) && last.in_flight) {
    report("in flight", site, "byte %zu of shared memory is written while a cp_async_16 of thread %d to it is not waited for",
           byte, last.thread);
    return false;
  }
  if (in_this_block(last.time) && !written_before(last, false)) {
    report("race", site, "byte %zu of shared memory is written after thread %d wrote it, with no barrier between", byte,
           last.thread);
    return false;
  }
  for (int warp = 0; warp < machine.warps; warp++) {
    uint32_t time = reads[warp].time[byte];
    bool by_me_alone = warp == machine.thread / LANES && reads[warp].lane[byte] == current_lane();
    if (in_this_block(time) && !by_me_alone && !ordered(time, warp)) {
      report("race", site, "byte %zu of shared memory is written after warp %d read it, with no barrier between", byte, warp);
      return false;
    }
  }
  return true;
}

void read(size_t byte, size_t bytes, bool whole_warp, Site site) {
  // Most often one thread wrote all of it at one time.
  bool uniform = true;
  for (size_t i = 1; i < bytes; i++) uniform &= same(written[byte], written[byte + i]);
  for (size_t i = 0; i < (uniform ? 1 : bytes); i++)
    if (!may_read(byte + i, whole_warp, site)) break;

  Reads& mine = reads[machine.thread / LANES];
  uint8_t lane = whole_warp ? SEVERAL_LANES : static_cast<uint8_t>(current_lane());
  uint32_t time = now();
  for (size_t i = byte; i < byte + bytes; i++) {
    mine.lane[i] = mine.time[i] == time && mine.lane[i] != lane ? SEVERAL_LANES : lane;
    mine.time[i] = time;
  }
}

void write(size_t byte, size_t bytes, bool in_flight, Site site) {
  for (size_t i = byte; i < byte + bytes; i++)
    if (!may_write(i, site)) break;
  std::fill_n(written + byte, bytes, Written{now(), static_cast<uint16_t>(machine.thread), in_flight});
}

void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  Written by_me{now(), static_cast<uint16_t>(machine.thread), false};
  std::fill_n(written + (copy.to - shared), 16, by_me);
}

// Returns the first byte's number.
size_t require_within(uintptr_t address, size_t bytes, bool is_write, Site site) {
  size_t byte = address - reinterpret_cast<uintptr_t>(shared);
  size_t size = static_cast<size_t>(machine.shared_bytes);
  if (byte >= size || bytes > size - byte) {
    report("out of bounds", site, "%s %zu bytes at byte %zu of shared memory, of which the launch asked for %d",
           is_write ? "writes" : "reads", bytes, byte, machine.shared_bytes);
    abandon();
  }
  return byte;
}

void require_multiple_of_16(uintptr_t address, const char* which, Site site) {
  if (address % 16 == 0) return;
  report("misaligned", site, "cp_async_16: the %s address ends in %d, which is not a multiple of 16", which,
         static_cast<int>(address % 16));
  abandon();
}

}  // namespace

unsigned char* const shared = map_zeros<unsigned char>(ALIGNMENT + CAPACITY) + ALIGNMENT;

unsigned char* shared_memory() { return shared; }

bool in_shared(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(shared) < CAPACITY; }

void access_shared(uintptr_t address, size_t bytes, bool is_write, bool whole_warp, Site site) {
  size_t byte = require_within(address, bytes, is_write, site);
  if (is_write)
    write(byte, bytes, false, site);
  else
    read(byte, bytes, whole_warp, site);
}

// All ones: NaN as fp16, bf16 and fp32.
void reset_shared() { std::memset(shared, 0xff, static_cast<size_t>(machine.shared_bytes)); }

// The copy may happen at any time until it is waited for. It is checked as a write now, so that it races with reads of what was
// there before, and done at the wait, so that nothing can make use of it earlier.
void copy(void* to, const void* from, int bytes, Site site) {
  uintptr_t target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  if (bytes < 0 || bytes > 16) {
    report("out of bounds", site, "cp_async_16 reads 0 to 16 bytes, not %d", bytes);
    abandon();
  }
  if (!in_shared(target)) {
    report("out of bounds", site, "cp_async_16 writes to %p, which is not in shared memory", to);
    abandon();
  }
  require_multiple_of_16(target, "shared", site);
  require_multiple_of_16(source, "global", site);
  if (bytes > 0) access_global(source, static_cast<size_t>(bytes), false, site);
  size_t byte = require_within(target, 16, true, site);
  write(byte, 16, true, site);
  Fiber& fiber = fibers[machine.thread];
  fiber.copies.push_back({static_cast<unsigned char*>(to), from, bytes, fiber.groups, site});
}

void commit_copies() { fibers[machine.thread].groups++; }

void wait_for_copies(int pending) {
  Fiber& fiber = fibers[machine.thread];
  auto landed = fiber.copies.begin();
  for (; landed != fiber.copies.end() && landed->group < fiber.groups - pending; ++landed) land(*landed);
  fiber.copies.erase(fiber.copies.begin(), landed);
}

void check_copies_after_exit(const Fiber& fiber) {
  for (const Copy& copy : fiber.copies)
    report("in flight", copy.site, "the thread leaves the kernel without waiting for this cp_async_16");
}

void forget_accesses() {
  madvise(written, CAPACITY * sizeof(Written), MADV_DONTNEED);
  madvise(reads, MAX_WARPS * sizeof(Reads), MADV_DONTNEED);
}

}  // namespace fastattn::emulator
