// The Python module `_cpu`. Tensors come as addresses, 0 for one that is not there; all of it was checked by the callers in
// fastattn/kernels/cpu. Python's lock is not held while the functions run.
#include <pybind11/pybind11.h>

#include "dropout.h"

namespace {

namespace py = pybind11;
using namespace py::literals;

void attention_bits(uintptr_t bits, uintptr_t prefix, uintptr_t key_begin, uintptr_t key_end, uintptr_t query_end,
                    uintptr_t query_starts, uintptr_t key_starts, int64_t rows, int64_t B, int64_t H, int64_t M, int64_t N,
                    int64_t low, int64_t high, int64_t prefix_high, int64_t seed, uint32_t threshold, int threads) {
  auto integers = [](uintptr_t address) { return reinterpret_cast<const int32_t*>(address); };
  fastattn::attention_bits(
      {reinterpret_cast<int32_t*>(bits), integers(prefix), integers(key_begin), integers(key_end), integers(query_end),
       integers(query_starts), integers(key_starts), rows, B, H, M, N, low, high, prefix_high, seed, threshold},
      threads);
}

void kept_elements(uintptr_t kept, int64_t rows, int64_t columns, int64_t seed, uint32_t threshold, uint32_t tag, int threads) {
  fastattn::kept_elements(reinterpret_cast<uint8_t*>(kept), rows, columns, seed, threshold, tag, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "What fastattn computes on CPUs itself, in C++ and by OpenMP's threads.";
  py::call_guard<py::gil_scoped_release> released;
  m.def("attention_bits", &attention_bits, released, "bits"_a, "prefix"_a, "key_begin"_a, "key_end"_a, "query_end"_a,
        "query_starts"_a, "key_starts"_a, "rows"_a, "B"_a, "H"_a, "M"_a, "N"_a, "low"_a, "high"_a, "prefix_high"_a, "seed"_a,
        "threshold"_a, "threads"_a);
  m.def("kept_elements", &kept_elements, released, "kept"_a, "rows"_a, "columns"_a, "seed"_a, "threshold"_a, "tag"_a,
        "threads"_a);
}
