// What a kernel sees of the emulator: the primitives of common/ptx.cuh under the same names, executed on a CPU by the files
// beside this one, and the parts of CUDA C++ that kernels use without a header. Only g++ is needed, no CUDA toolkit.
//
// A kernel's threads are fibers that take turns; a warp collective is a meeting of 32 of them, the last of which executes it for
// all. Kernel sources are compiled with -fsanitize=thread, whose hooks show the emulator every load and store of a kernel before
// it happens. It reports what a GPU would not: see machine.h for the rules and reports.cpp for the form.
//
// Each primitive has one more parameter than on a GPU, its call site, which callers leave out.
#pragma once

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "The emulator switches stacks with x86-64 instructions and needs g++."
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

// Two libraries with an emulator each may be loaded into one process: nothing here is visible outside of its own.
#pragma GCC visibility push(hidden)

#ifdef __SANITIZE_THREAD__
// The hooks do not see into memcpy and memset; in kernel sources these are the emulator's.
extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("fastattn_emulator_memcpy");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("fastattn_emulator_memset");
#endif

#include "numbers.h"

#define DEVICE inline __attribute__((always_inline))
#define HOST_DEVICE DEVICE
#define KERNEL(threads, blocks_per_multiprocessor) void
#define KERNEL_ARGUMENT const
#define SHARED_MEMORY(name) unsigned char* name = fastattn::emulator::shared_memory()

namespace fastattn::emulator {

constexpr int MAX_SHARED_BYTES = 227 * 1024;  // of a block, on an H100

// Where in a kernel something happens: file and line of a primitive's call, or the address that a load's or store's hook returns
// to.
struct Site {
  const char* file;
  int line;
  const void* address;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line, nullptr}; }
};

unsigned char* shared_memory();
void require_alignment(const void* address, int bytes);

void mma_half(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);
void copy(void* shared, const void* global, int bytes, Site site);
void commit_copies();
void wait_for_copies(int pending);
uint64_t exchange_bits(const char* name, uint64_t bits, int source_lane, Site site);
uint32_t ballot(const char* name, bool predicate, Site site);
int current_lane();
void block_barrier(Site site);
void warp_barrier(Site site);
void named_barrier_sync(int id, int threads, Site site);
void named_barrier_arrive(int id, int threads, Site site);
void launch(const char* name, const Launch& where, void (*kernel)(const void*), const void* arguments, size_t argument_bytes);

template <class V>
DEVICE V exchange(const char* name, V value, int source_lane, Site site) {
  static_assert(std::is_arithmetic_v<V> && (sizeof(V) == 4 || sizeof(V) == 8));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = exchange_bits(name, bits, source_lane, site);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The vector types of CUDA. A GPU loads and stores them whole, at multiples of their size, while g++ may well take them apart:
// their copies check the alignment.
template <int BYTES>
struct Aligned {
  Aligned() = default;
  Aligned(const Aligned& source) { require_alignment(&source, BYTES); }
  Aligned& operator=(const Aligned& source) {
    require_alignment(&source, BYTES);
    require_alignment(this, BYTES);
    return *this;
  }
};

struct Index {
  unsigned x, y, z;
};

}  // namespace fastattn::emulator

extern fastattn::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 : fastattn::emulator::Aligned<8> {
  uint32_t x, y;
  uint2() = default;
  uint2(uint32_t x, uint32_t y) : x(x), y(y) {}
};
struct alignas(16) uint4 : fastattn::emulator::Aligned<16> {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
};
struct alignas(16) int4 : fastattn::emulator::Aligned<16> {
  int x, y, z, w;
  int4() = default;
  int4(int x, int y, int z, int w) : x(x), y(y), z(z), w(w) {}
};
struct alignas(8) float2 : fastattn::emulator::Aligned<8> {
  float x, y;
  float2() = default;
  float2(float x, float y) : x(x), y(y) {}
};
struct alignas(16) float4 : fastattn::emulator::Aligned<16> {
  float x, y, z, w;
  float4() = default;
  float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
};
static_assert(sizeof(uint2) == 8 && sizeof(uint4) == 16 && sizeof(int4) == 16 && sizeof(float2) == 8 && sizeof(float4) == 16);

DEVICE uint32_t __float_as_uint(float x) { return fastattn::emulator::bits_of(x); }
DEVICE float __uint_as_float(uint32_t bits) { return fastattn::emulator::float_of(bits); }

// What CUDA has in the global namespace.
using std::isfinite;
using std::isinf;
using std::isnan;
DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
DEVICE unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

namespace fastattn {

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, Bfloat16>);
  if constexpr (std::is_same_v<T, Half>)
    emulator::mma_half(d, a, b, site);
  else
    emulator::mma_bfloat16(d, a, b, site);
}
// The first eight columns of a, and rows of b, of the 16 that mma_m16n8k16 takes; the others are 0.
template <class T>
DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, emulator::Site site = emulator::Site::here()) {
  mma_m16n8k16<T>(d, {a[0], a[1], 0, 0}, {b, 0}, site);
}
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulator::Site site = emulator::Site::here()) {
  emulator::mma_tf32(d, a, b, site);
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, emulator::Site site = emulator::Site::here()) {
  emulator::ldmatrix(r, 2, false, row, site);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  emulator::ldmatrix(r, 4, false, row, site);
}
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, emulator::Site site = emulator::Site::here()) {
  emulator::ldmatrix(r, 2, true, row, site);
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  emulator::ldmatrix(r, 4, true, row, site);
}

DEVICE void cp_async_16(void* shared, const void* global, int bytes, emulator::Site site = emulator::Site::here()) {
  emulator::copy(shared, global, bytes, site);
}
DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int PENDING>
DEVICE void cp_async_wait() {
  emulator::wait_for_copies(PENDING);
}

// Shuffles differ in the lane that each lane reads; one without a lane to read keeps its own value. PTX takes the low 5 bits of
// `lane`, `mask` and `delta`.
template <class V>
DEVICE V shuffle(V value, int lane, emulator::Site site = emulator::Site::here()) {
  return emulator::exchange("shuffle", value, lane & 31, site);
}
template <class V>
DEVICE V shuffle_xor(V value, int mask, emulator::Site site = emulator::Site::here()) {
  return emulator::exchange("shuffle_xor", value, emulator::current_lane() ^ (mask & 31), site);
}
template <class V>
DEVICE V shuffle_up(V value, int delta, emulator::Site site = emulator::Site::here()) {
  int lane = emulator::current_lane(), source = lane - (delta & 31);
  return emulator::exchange("shuffle_up", value, source < 0 ? lane : source, site);
}
template <class V>
DEVICE V shuffle_down(V value, int delta, emulator::Site site = emulator::Site::here()) {
  int lane = emulator::current_lane(), source = lane + (delta & 31);
  return emulator::exchange("shuffle_down", value, source > 31 ? lane : source, site);
}
DEVICE uint32_t vote_ballot(bool predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("vote_ballot", predicate, site);
}
DEVICE bool vote_any(bool predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("vote_any", predicate, site) != 0;
}
DEVICE bool vote_all(bool predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("vote_all", predicate, site) == 0xffffffffu;
}

DEVICE void block_barrier(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
DEVICE void warp_barrier(emulator::Site site = emulator::Site::here()) { emulator::warp_barrier(site); }
DEVICE void named_barrier_sync(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::named_barrier_sync(id, threads, site);
}
DEVICE void named_barrier_arrive(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::named_barrier_arrive(id, threads, site);
}

DEVICE float to_float(Half x) { return emulator::half_to_float(x.bits); }
DEVICE float to_float(Bfloat16 x) { return emulator::bfloat16_to_float(x.bits); }

template <class T>
DEVICE T from_float(float x) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, Bfloat16>);
  return {std::is_same_v<T, Half> ? emulator::float_to_half(x) : emulator::float_to_bfloat16(x)};
}

template <class T>
DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

DEVICE uint32_t to_tf32(float x) { return emulator::float_to_tf32(x); }

DEVICE float exp2_approximate(float x) { return emulator::flush_subnormal(exp2f(emulator::flush_subnormal(x))); }

inline int shared_memory_limit(const char*) { return emulator::MAX_SHARED_BYTES; }

template <auto kernel, class Arguments>
void launch(const char* name, const Launch& where, Arguments arguments) {
  emulator::launch(
      name, where, [](const void* packed) { kernel(*static_cast<const Arguments*>(packed)); }, &arguments, sizeof arguments);
}

}  // namespace fastattn

#pragma GCC visibility pop
