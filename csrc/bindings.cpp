// The Python module `_cuda`. A request is an object that Python makes once, of strides, sizes and flags; a launch of it takes
// integers alone: addresses, and of packed sequences and of matrices the numbers of rows. So the module is built without torch
// and works with every version of it. All of these were checked by the callers in fastattn/kernels/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/backward.h"
#include "attention/forward.h"
#include "ffn/linear.h"

namespace {

using namespace fastattn;
namespace py = pybind11;
using namespace py::literals;

// A request, and the places in it of what differs from launch to launch. A launch's integers go to these places in the order in
// which they were named, into the request itself: no two launches of it run at once, as each holds Python's lock throughout.
template <class P>
class Request {
 public:
  using Start = void (*)(const P&, uintptr_t stream);

  explicit Request(Start start) : start(start) {}
  Request(const Request&) = delete;  // places refer to p

  P p{};

  template <class... T>
  void takes(T*&... pointers) {
    (places.push_back([&pointers](int64_t address) { pointers = reinterpret_cast<T*>(address); }), ...);
  }
  void takes_number(std::function<void(int64_t)> place) { places.push_back(std::move(place)); }

  // `more`: how many integers follow that go to no place.
  void fill(const py::args& integers, size_t more) {
    if (integers.size() != places.size() + more) throw wrong_count(integers.size(), more);
    for (size_t i = 0; i < places.size(); i++) places[i](integer(integers, i));
  }

  // The last integer is the stream.
  void launch(const py::args& integers) {
    fill(integers, 1);
    start(p, static_cast<uintptr_t>(integer(integers, places.size())));
  }

 private:
  Start start;
  std::vector<std::function<void(int64_t)>> places;

  py::type_error wrong_count(size_t count, size_t more) const {
    return py::type_error("this request takes " + std::to_string(places.size()) + " integers and " + std::to_string(more) +
                          " more, got " + std::to_string(count) + " in all");
  }

  static int64_t integer(const py::args& integers, size_t i) {
    int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(integers.ptr(), static_cast<Py_ssize_t>(i)));
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }
};

// Attention

using Strides = std::array<int64_t, 3>;  // of batch, head, row
using Sizes = std::array<int, 6>;        // B, H, Hkv, M, N, D

// Every field of LoweredMask that kernels read, in its order: integers or None; of vectors, whether they are there; of other
// tensors their strides or None; whether sequences are packed.
using MaskArgument = std::tuple<std::optional<int>, std::optional<int>, std::optional<int>, bool, bool, bool, bool,
                                std::optional<std::array<int64_t, 2>>, std::optional<std::array<int64_t, 2>>,
                                std::optional<std::array<int64_t, 2>>, std::optional<std::array<int64_t, 4>>,
                                std::optional<Strides>, std::optional<Strides>, bool>;

template <class P>
void take_heads(Request<P>& request, Heads& x, const Strides& strides) {
  x = {nullptr, strides[0], strides[1], strides[2]};
  request.takes(x.data);
}

// A result: (B, rows, heads, D) in memory. Of packed sequences B is 1 there.
template <class P>
void take_result(Request<P>& request, Heads& x, int heads, int rows, bool packed) {
  int64_t D = request.p.D, row = heads * D;
  take_heads(request, x, {packed ? 0 : rows * row, D, row});
}

template <class P>
void take_tiles(Request<P>& request, TileLists& x, const std::optional<Strides>& strides) {
  if (!strides) return;
  auto [batch, head, row] = *strides;
  x = {nullptr, batch, head, row};
  request.takes(x.data);
}

// No int32 leads to a row beyond.
int at_most_int32(int64_t rows) { return static_cast<int>(std::min<int64_t>(rows, std::numeric_limits<int>::max())); }

// The mask's tensors that are there, in LoweredMask's order; of packed sequences then the rows of queries and of keys.
template <class P>
void take_mask(Request<P>& request, const MaskArgument& x) {
  const auto& [low, high, prefix_high, prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, key_tiles, query_tiles,
               packed] = x;
  P& p = request.p;
  Mask& m = p.mask;
  m.has_low = low.has_value(), m.low = low.value_or(0);
  m.has_high = high.has_value(), m.high = high.value_or(0);
  m.prefix_high = prefix_high.value_or(0);
  if (prefix) request.takes(m.prefix);
  if (key_begin) request.takes(m.key_begin);
  if (key_end) request.takes(m.key_end);
  if (query_end) request.takes(m.query_end);
  if (keys) m.keys_batch = keys->at(0), m.keys_key = keys->at(1), request.takes(m.keys);
  if (ids) m.ids_batch = ids->at(0), m.ids_query = ids->at(1), request.takes(m.ids);
  if (key_ids) m.key_ids_batch = key_ids->at(0), m.key_ids_key = key_ids->at(1), request.takes(m.key_ids);
  if (bits) {
    m.bits_batch = bits->at(0), m.bits_head = bits->at(1), m.bits_row = bits->at(2), m.bits_word = bits->at(3);
    request.takes(m.bits);
  }
  take_tiles(request, m.key_tiles, key_tiles);
  take_tiles(request, m.query_tiles, query_tiles);
  if (!packed) return;
  request.takes(m.query_starts.data, m.key_starts.data);
  request.takes_number([&p](int64_t rows) { p.mask.query_starts.rows = at_most_int32(rows), p.lse_head = rows; });
  request.takes_number([&p](int64_t rows) { p.mask.key_starts.rows = at_most_int32(rows); });
}

bool is_packed(const MaskArgument& mask) { return std::get<std::tuple_size_v<MaskArgument> - 1>(mask); }

// lse is contiguous, (B, H, M) or, of packed sequences, (1, H, rows).
template <class P>
void set_sizes(P& p, const Sizes& sizes, bool packed) {
  p.B = sizes[0], p.H = sizes[1], p.Hkv = sizes[2], p.M = sizes[3], p.N = sizes[4], p.D = sizes[5];
  p.lse_head = p.M, p.lse_batch = packed ? 0 : static_cast<int64_t>(p.H) * p.M;
}

// Takes q, k, v, out, lse, then what take_mask names.
std::unique_ptr<Request<AttentionForward>> attention_forward_request(const Strides& q, const Strides& k, const Strides& v,
                                                                     const MaskArgument& mask, float scale, const Sizes& sizes,
                                                                     bool bfloat16, bool aligned) {
  auto request = std::make_unique<Request<AttentionForward>>(&attention_forward);
  AttentionForward& p = request->p;
  set_sizes(p, sizes, is_packed(mask));
  p.scale = scale, p.bfloat16 = bfloat16, p.aligned = aligned;
  take_heads(*request, p.q, q);
  take_heads(*request, p.k, k);
  take_heads(*request, p.v, v);
  take_result(*request, p.out, p.H, p.M, is_packed(mask));
  request->takes(p.lse);
  take_mask(*request, mask);
  return request;
}

// Takes q, k, v, out, dout, lse, dlse if there is one, dq, dk, dv, delta unless `single`, then what take_mask names.
std::unique_ptr<Request<AttentionBackward>> attention_backward_request(const Strides& q, const Strides& k, const Strides& v,
                                                                       const Strides& out, const Strides& dout,
                                                                       const MaskArgument& mask, float scale, const Sizes& sizes,
                                                                       bool bfloat16, bool aligned, bool dlse, bool single) {
  auto request = std::make_unique<Request<AttentionBackward>>(single ? &attention_backward_single : &attention_backward);
  AttentionBackward& p = request->p;
  bool packed = is_packed(mask);
  set_sizes(p, sizes, packed);
  p.scale = scale, p.bfloat16 = bfloat16, p.aligned = aligned;
  take_heads(*request, p.q, q);
  take_heads(*request, p.k, k);
  take_heads(*request, p.v, v);
  take_heads(*request, p.out, out);
  take_heads(*request, p.dout, dout);
  request->takes(p.lse);
  if (dlse) request->takes(p.dlse);
  take_result(*request, p.dq, p.H, p.M, packed);
  take_result(*request, p.dk, p.Hkv, p.N, packed);
  take_result(*request, p.dv, p.Hkv, p.N, packed);
  if (!single) request->takes(p.delta);
  take_mask(*request, mask);
  return request;
}

// (capacity, warps, rows, shared_bytes)
std::array<int, 4> py_attention_forward_config(int D, int M, int N, int shared_limit) {
  AttentionForwardConfig c = attention_forward_config(D, M, N, shared_limit);
  return {c.capacity, c.warps, c.rows, c.shared_bytes};
}

// (b, h, m, n, keys, masked) of each block of pairs; the mask's tensors are on the CPU, and no others are looked at.
std::vector<std::array<int, 6>> py_attention_forward_blocks(Request<AttentionForward>& request, int shared_limit,
                                                            const py::args& integers) {
  request.fill(integers, 0);
  std::vector<std::array<int, 6>> blocks;
  for (const AttentionForwardBlock& x : attention_forward_blocks(request.p, shared_limit))
    blocks.push_back({x.b, x.h, x.m, x.n, x.keys, x.masked});
  return blocks;
}

// FFN

// Takes x, weight, bias, residual and z where they are there, y, then the number of rows.
std::unique_ptr<Request<Linear>> linear_request(int64_t x_row, int64_t weight_row, int K, int F, int activation, bool bias,
                                                bool residual, bool z, bool bfloat16, bool wide_bias, bool wide, bool aligned,
                                                bool vectors) {
  auto request = std::make_unique<Request<Linear>>(&linear);
  Linear& p = request->p;
  p.x_row = x_row, p.weight_row = weight_row, p.K = K, p.F = F;
  p.activation = static_cast<Activation>(activation);
  p.bfloat16 = bfloat16, p.wide_bias = wide_bias, p.wide = wide, p.aligned = aligned, p.vectors = vectors;
  request->takes(p.x, p.weight);
  if (bias) request->takes(p.bias);
  if (residual) request->takes(p.residual);
  if (z) request->takes(p.z);
  request->takes(p.y);
  request->takes_number([&p](int64_t rows) { p.rows = rows; });
  return request;
}

// Takes dy, z and dz if there is an activation, sums if they are wanted, then the numbers of rows and of splits.
std::unique_ptr<Request<ActivationBackward>> activation_backward_request(int64_t dy_row, int F, int activation, bool sums,
                                                                         bool bfloat16, bool vectors) {
  auto request = std::make_unique<Request<ActivationBackward>>(&activation_backward);
  ActivationBackward& p = request->p;
  p.dy_row = dy_row, p.F = F, p.activation = static_cast<Activation>(activation);
  p.bfloat16 = bfloat16, p.vectors = vectors;
  request->takes(p.dy);
  if (p.activation != Activation::none) request->takes(p.z, p.dz);
  if (sums) request->takes(p.sums);
  request->takes_number([&p](int64_t rows) { p.rows = rows; });
  request->takes_number([&p](int64_t splits) { p.splits = static_cast<int>(splits); });
  return request;
}

// The Python class of a request, made by `make`.
template <class P, class Make, class... Names>
py::class_<Request<P>> add_request(py::module_& m, const char* name, Make make, const Names&... names) {
  return py::class_<Request<P>>(m, name).def(py::init(make), names...).def("launch", &Request<P>::launch);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "Requests of fastattn's CUDA kernels. `launch` takes integers alone: addresses and numbers of rows, then the stream. It "
      "raises RuntimeError with the kernel's name if the launch fails.";
  add_request<AttentionForward>(m, "AttentionForward", &attention_forward_request, "q"_a, "k"_a, "v"_a, "mask"_a, "scale"_a,
                                "sizes"_a, "bfloat16"_a, "aligned"_a)
      .def("blocks", &py_attention_forward_blocks);
  add_request<AttentionBackward>(m, "AttentionBackward", &attention_backward_request, "q"_a, "k"_a, "v"_a, "out"_a, "dout"_a,
                                 "mask"_a, "scale"_a, "sizes"_a, "bfloat16"_a, "aligned"_a, "dlse"_a, "single"_a);
  add_request<Linear>(m, "Linear", &linear_request, "x_row"_a, "weight_row"_a, "K"_a, "F"_a, "activation"_a, "bias"_a,
                      "residual"_a, "z"_a, "bfloat16"_a, "wide_bias"_a, "wide"_a, "aligned"_a, "vectors"_a);
  add_request<ActivationBackward>(m, "ActivationBackward", &activation_backward_request, "dy_row"_a, "F"_a, "activation"_a,
                                  "sums"_a, "bfloat16"_a, "vectors"_a);
  m.def("attention_forward_config", &py_attention_forward_config, "D"_a, "M"_a, "N"_a, "shared_limit"_a);
  py::dict kernels;  // name: (threads, bytes of shared memory) of a block
  for (const auto& group : {attention_forward_kernels(), attention_backward_single_kernels(), attention_backward_kernels(),
                            linear_kernels(), activation_backward_kernels()})
    for (const Kernel& kernel : group) kernels[kernel.name.c_str()] = py::make_tuple(kernel.threads, kernel.shared_bytes);
  m.attr("kernels") = kernels;
}
