// Global memory: a kernel may touch the elements of the views that are watched, and nothing else. Gaps between the elements of a
// view, and what lies before or behind it, are out of bounds.
#include <sys/mman.h>

#include <memory>
#include <stdexcept>

#include "ordering.h"

namespace fastattn::emulator {
namespace {

enum Access { READ = 0, WRITE = 1, READ_AND_WRITE = 2, WRITE_SOME = 3 };
enum State : uint8_t { ELEMENT = 1, WRITTEN = 2 };

// One entry per element between a view's first and last, in zero pages that take up memory only where they are used: a view may
// have gaps of gigabytes.
template <class T>
struct Entries {
  T* at;
  size_t bytes;

  explicit Entries(int64_t count) : bytes(static_cast<size_t>(count) * sizeof(T)) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory to watch a view");
    at = static_cast<T*>(memory);
  }
  Entries(const Entries&) = delete;
  ~Entries() { munmap(at, bytes); }
  T& operator[](int64_t i) { return at[i]; }
};

struct View {
  std::string name;
  uintptr_t address;
  int element_bytes;
  int64_t extent;  // elements from the first to the last, gaps included
  std::vector<int64_t> sizes, strides;
  Access access;
  Entries<uint8_t> state;
  Entries<Written> last_write;

  View(const char* name, uintptr_t address, int element_bytes, int64_t extent, std::vector<int64_t> sizes,
       std::vector<int64_t> strides, Access access)
      : name(name),
        address(address),
        element_bytes(element_bytes),
        extent(extent),
        sizes(std::move(sizes)),
        strides(std::move(strides)),
        access(access),
        state(extent),
        last_write(extent) {}

  bool readable() const { return access == READ || access == READ_AND_WRITE; }
  bool writable() const { return access != READ; }
  uintptr_t end() const { return address + static_cast<uintptr_t>(extent) * element_bytes; }
};

std::vector<std::unique_ptr<View>> views;

// Calls visit(index, offset) for every element.
template <class Visit>
void for_each_element(const View& view, Visit visit) {
  std::vector<int64_t> index(view.sizes.size(), 0);
  int64_t offset = 0;
  for (;;) {
    visit(index, offset);
    int d = static_cast<int>(index.size()) - 1;
    for (; d >= 0; d--) {
      offset += view.strides[d];
      if (++index[d] < view.sizes[d]) break;
      offset -= view.sizes[d] * view.strides[d];
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

enum class Found { OUTSIDE, IN_A_GAP, NOT_ALLOWED, NOT_WRITTEN, ALLOWED };

struct Range {
  int64_t first, last;  // elements of a view
};

Found find(View& view, uintptr_t address, size_t bytes, bool write, Range& range) {
  uintptr_t offset = address - view.address, length = view.end() - view.address;
  if (offset >= length || bytes > length - offset) return Found::OUTSIDE;
  range.first = static_cast<int64_t>(offset / static_cast<uintptr_t>(view.element_bytes));
  range.last = static_cast<int64_t>((offset + bytes - 1) / static_cast<uintptr_t>(view.element_bytes));
  uint8_t common = ELEMENT | WRITTEN;
  for (int64_t e = range.first; e <= range.last; e++) common &= view.state[e];
  if (!(common & ELEMENT)) return Found::IN_A_GAP;
  if (write) return view.writable() ? Found::ALLOWED : Found::NOT_ALLOWED;
  return view.readable() || (common & WRITTEN) ? Found::ALLOWED : Found::NOT_WRITTEN;
}

// Blocks of a launch are not ordered at all. Returns whether the access is in order, so that it is reported once.
bool may_follow(const View& view, const Written& last, bool write, Site site) {
  const char* what = write ? "written" : "read";
  if (last.time < machine.launch_began) return true;
  if (!in_this_block(last.time))
    report("race", site, "an element of '%s' is %s after another block of the launch wrote it", view.name.c_str(), what);
  else if (!written_before(last, false))
    report("race", site, "an element of '%s' is %s after thread %d wrote it, with no barrier between", view.name.c_str(), what,
           last.thread);
  else
    return true;
  return false;
}

void note(View& view, Range range, bool write, Site site) {
  if (!view.writable()) return;
  for (int64_t e = range.first; e <= range.last; e++)
    if (!may_follow(view, view.last_write[e], write, site)) break;
  if (!write) return;
  for (int64_t e = range.first; e <= range.last; e++) {
    view.state[e] |= WRITTEN;
    view.last_write[e] = {now(), static_cast<uint16_t>(machine.thread), false};
  }
}

void report_outside(uintptr_t address, size_t bytes, bool write, Site site) {
  const char* verb = write ? "writes" : "reads";
  const View* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const auto& view : views) {
    uintptr_t away = 0;
    if (address < view->address)
      away = view->address - address;
    else if (address >= view->end() || bytes > view->end() - address)
      away = address - view->end() + bytes;
    if (away < distance) {
      distance = away;
      nearest = view.get();
    }
  }
  if (!nearest || distance > 1 << 30)
    report("out of bounds", site, "%s %zu bytes at %p, which is in no tensor", verb, bytes, reinterpret_cast<void*>(address));
  else if (distance == 0)
    report("out of bounds", site, "%s %zu bytes in a gap between the elements of '%s'", verb, bytes, nearest->name.c_str());
  else
    report("out of bounds", site, "%s %zu bytes, up to %zu bytes %s '%s'", verb, bytes, static_cast<size_t>(distance),
           address < nearest->address ? "before the start of" : "past the end of", nearest->name.c_str());
}

}  // namespace

// Views may share memory, as q, k and v of one projection do: one that allows the access is enough.
void access_global(uintptr_t address, size_t bytes, bool write, Site site) {
  const View* best = nullptr;
  Found found = Found::OUTSIDE;
  for (const auto& view : views) {
    Range range;
    Found here = find(*view, address, bytes, write, range);
    if (here == Found::ALLOWED) note(*view, range, write, site);
    if (here > found) {
      found = here;
      best = view.get();
    }
  }
  if (found == Found::ALLOWED) return;
  if (found == Found::NOT_WRITTEN)
    return report("uninitialised read", site, "'%s' is read before it is written", best->name.c_str());
  if (found == Found::NOT_ALLOWED)
    report("read-only", site, "writes %zu bytes to '%s', which is an input", bytes, best->name.c_str());
  else
    report_outside(address, bytes, write, site);
  abandon();
}

void check_unwritten() {
  for (const auto& view : views) {
    if (view->access != WRITE) continue;
    int64_t missing = 0;
    std::string first;
    for_each_element(*view, [&](const std::vector<int64_t>& index, int64_t offset) {
      if ((view->state[offset] & WRITTEN) || missing++) return;
      for (int64_t i : index) first += (first.empty() ? "" : ", ") + std::to_string(i);
    });
    if (missing)
      report("unwritten output", {view->name.c_str(), 0, nullptr}, "%lld elements of '%s' are never written, the first at (%s)",
             static_cast<long long>(missing), view->name.c_str(), first.c_str());
  }
}

void forget_views() { views.clear(); }

}  // namespace fastattn::emulator

using namespace fastattn::emulator;

// The view of `dims` dimensions at `address`, strides in elements. access 0: an input. 1: an output, to be written completely,
// and read only thereafter. 2: read and written. 3: as 1, but elements may be left out.
extern "C" __attribute__((visibility("default"))) void fastattn_emulator_watch(const char* name, const void* address,
                                                                               int element_bytes, int dims, const int64_t* sizes,
                                                                               const int64_t* strides, int access) {
  if (!address) return;
  if (element_bytes < 1 || access < READ || access > WRITE_SOME)
    return report("misuse", Site::here(), "'%s' is watched with elements of %d bytes and access %d", name, element_bytes, access);
  int64_t extent = 1;
  bool empty = false;
  for (int d = 0; d < dims; d++) {
    if (sizes[d] < 0 || strides[d] < 0)
      return report("misuse", Site::here(), "'%s' is watched with a negative size or stride", name);
    empty |= sizes[d] == 0;
    extent += (sizes[d] - 1) * strides[d];
  }
  if (empty) return;
  auto view = std::make_unique<View>(name, reinterpret_cast<uintptr_t>(address), element_bytes, extent,
                                     std::vector<int64_t>(sizes, sizes + dims), std::vector<int64_t>(strides, strides + dims),
                                     static_cast<Access>(access));
  for_each_element(*view, [&](const auto&, int64_t offset) { view->state[offset] = ELEMENT; });
  views.push_back(std::move(view));
}
