// What g++ -fsanitize=thread calls before every load and store of a kernel. Its runtime library is not linked; these are the
// hooks.
#include <link.h>

#include <cstring>

#include "machine.h"

namespace fastattn::emulator {
namespace {

bool within(uintptr_t address, size_t bytes, const void* start, size_t length) {
  uintptr_t offset = address - reinterpret_cast<uintptr_t>(start);
  return offset < length && bytes <= length - offset;
}

struct Segment {
  uintptr_t start;
  size_t length;
};

// This library's read-only memory: constants, and tables of addresses that the loader has finished.
std::vector<Segment> find_constants() {
  std::vector<Segment> constants;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        uintptr_t self = reinterpret_cast<uintptr_t>(&machine);
        bool ours = false;
        std::vector<Segment> segments;
        for (int i = 0; i < library->dlpi_phnum; i++) {
          const ElfW(Phdr) & header = library->dlpi_phdr[i];
          Segment segment{library->dlpi_addr + header.p_vaddr, header.p_memsz};
          if (header.p_type == PT_LOAD && self - segment.start < segment.length) ours = true;
          if ((header.p_type == PT_LOAD && !(header.p_flags & PF_W)) || header.p_type == PT_GNU_RELRO)
            segments.push_back(segment);
        }
        if (ours) *static_cast<std::vector<Segment>*>(result) = segments;
        return ours ? 1 : 0;
      },
      &constants);
  return constants;
}

bool is_constant(uintptr_t address, size_t bytes) {
  static const std::vector<Segment> constants = find_constants();
  for (const Index* index : {&threadIdx, &blockIdx, &blockDim, &gridDim})
    if (within(address, bytes, index, sizeof *index)) return true;
  if (within(address, bytes, machine.arguments, machine.argument_bytes)) return true;
  for (const Segment& segment : constants)
    if (within(address, bytes, reinterpret_cast<const void*>(segment.start), segment.length)) return true;
  return false;
}

bool on_stack(uintptr_t address) { return address - machine.stack < STACK_BYTES; }

void require_multiple(uintptr_t address, size_t bytes, Site site) {
  if (address % bytes == 0 || on_stack(address)) return;
  report("misaligned", site, "an access of %zu bytes at an address that ends in %d", bytes, static_cast<int>(address % 16));
  abandon();
}

Site return_to(const void* address) { return {nullptr, 0, address}; }

template <size_t BYTES>
void access_aligned(void* pointer, bool write, const void* return_address) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!machine.running || on_stack(address)) return;
  require_multiple(address, BYTES, return_to(return_address));
  access(address, BYTES, write, return_to(return_address));
}

void access_range(const void* pointer, size_t bytes, bool write, const void* return_address) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!machine.running || bytes == 0 || within(address, bytes, reinterpret_cast<void*>(machine.stack), STACK_BYTES)) return;
  access(address, bytes, write, return_to(return_address));
}

}  // namespace

void access(uintptr_t address, size_t bytes, bool write, Site site) {
  if (in_shared(address))
    access_shared(address, bytes, write, false, site);
  else if (write || !is_constant(address, bytes))
    access_global(address, bytes, write, site);
}

void require_alignment(const void* address, int bytes) {
  if (machine.running)
    require_multiple(reinterpret_cast<uintptr_t>(address), static_cast<size_t>(bytes), return_to(__builtin_return_address(0)));
}

}  // namespace fastattn::emulator

using namespace fastattn::emulator;

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define ACCESS_HOOKS(BYTES)                                                                                       \
  HOOK void __tsan_read##BYTES(void* p) { access_aligned<BYTES>(p, false, __builtin_return_address(0)); }         \
  HOOK void __tsan_write##BYTES(void* p) { access_aligned<BYTES>(p, true, __builtin_return_address(0)); }         \
  HOOK void __tsan_unaligned_read##BYTES(void* p) { access_range(p, BYTES, false, __builtin_return_address(0)); } \
  HOOK void __tsan_unaligned_write##BYTES(void* p) { access_range(p, BYTES, true, __builtin_return_address(0)); }

ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

HOOK void __tsan_read_range(void* p, size_t bytes) { access_range(p, bytes, false, __builtin_return_address(0)); }
HOOK void __tsan_write_range(void* p, size_t bytes) { access_range(p, bytes, true, __builtin_return_address(0)); }

HOOK void* fastattn_emulator_memcpy(void* to, const void* from, size_t bytes) {
  access_range(from, bytes, false, __builtin_return_address(0));
  access_range(to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}

HOOK void* fastattn_emulator_memset(void* to, int value, size_t bytes) {
  access_range(to, bytes, true, __builtin_return_address(0));
  return memset(to, value, bytes);
}

// The rest of the interface has nothing to say here. Host code has virtual tables, and guards of its static variables.
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
