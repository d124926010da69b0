// The Python module `_cuda`. Tensors arrive as addresses and strides, so it is built without torch and works with every version
// of it. Addresses, sizes and strides were checked by the callers in fastattn/kernels/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "attention/backward.h"
#include "attention/forward.h"
#include "ffn/linear.h"

namespace {

using namespace fastattn;
namespace py = pybind11;
using namespace py::literals;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using HeadsArgument = std::array<int64_t, 4>;   // address; strides of batch, head, row
using LseArgument = std::array<int64_t, 3>;     // address; strides of batch, head
using MatrixArgument = std::array<int64_t, 2>;  // address; stride of a row

Heads heads(const HeadsArgument& x) { return {pointer<void>(x[0]), x[1], x[2], x[3]}; }

// Every field of LoweredMask that kernels read, in its order: integers or None; (address, strides...) of tensors, with address 0
// for None. Of packed sequences the addresses of the starts, then how many rows of queries and of keys there are.
using MaskArgument =
    std::tuple<std::optional<int>, std::optional<int>, std::optional<int>, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
               std::array<int64_t, 3>, std::array<int64_t, 3>, std::array<int64_t, 3>, std::array<int64_t, 5>,
               std::array<int64_t, 4>, std::array<int64_t, 4>, uintptr_t, uintptr_t, int, int>;

Mask mask(const MaskArgument& x) {
  auto [low, high, prefix_high, prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, key_tiles, query_tiles,
        query_starts, key_starts, query_rows, key_rows] = x;
  Mask m{};
  m.has_low = low.has_value(), m.low = low.value_or(0);
  m.has_high = high.has_value(), m.high = high.value_or(0);
  m.prefix = pointer<int32_t>(prefix), m.prefix_high = prefix_high.value_or(0);
  m.key_begin = pointer<int32_t>(key_begin), m.key_end = pointer<int32_t>(key_end);
  m.query_end = pointer<int32_t>(query_end);
  m.keys = pointer<uint8_t>(keys[0]), m.keys_batch = keys[1], m.keys_key = keys[2];
  m.ids = pointer<int32_t>(ids[0]), m.ids_batch = ids[1], m.ids_query = ids[2];
  m.key_ids = pointer<int32_t>(key_ids[0]), m.key_ids_batch = key_ids[1], m.key_ids_key = key_ids[2];
  m.bits = pointer<int32_t>(bits[0]);
  m.bits_batch = bits[1], m.bits_head = bits[2], m.bits_row = bits[3], m.bits_word = bits[4];
  m.key_tiles = {pointer<int32_t>(key_tiles[0]), key_tiles[1], key_tiles[2], key_tiles[3]};
  m.query_tiles = {pointer<int32_t>(query_tiles[0]), query_tiles[1], query_tiles[2], query_tiles[3]};
  m.query_starts = {pointer<int32_t>(query_starts), query_rows};
  m.key_starts = {pointer<int32_t>(key_starts), key_rows};
  return m;
}

void py_attention_forward(const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                          const LseArgument& lse, const MaskArgument& mask_argument, float scale, const std::array<int, 6>& sizes,
                          bool bfloat16, bool aligned, uintptr_t stream) {
  AttentionForward p{};
  p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out);
  p.lse = pointer<float>(lse[0]), p.lse_batch = lse[1], p.lse_head = lse[2];
  p.mask = mask(mask_argument);
  p.scale = scale;
  p.B = sizes[0], p.H = sizes[1], p.Hkv = sizes[2], p.M = sizes[3], p.N = sizes[4], p.D = sizes[5];
  p.bfloat16 = bfloat16, p.aligned = aligned;
  attention_forward(p, stream);
}

using Backward = void(const AttentionBackward&, uintptr_t);

template <Backward backward>
void py_attention_backward(const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                           const HeadsArgument& dout, const HeadsArgument& dq, const HeadsArgument& dk, const HeadsArgument& dv,
                           const LseArgument& lse, uintptr_t dlse, uintptr_t delta, const MaskArgument& mask_argument,
                           float scale, const std::array<int, 6>& sizes, bool bfloat16, bool aligned, uintptr_t stream) {
  AttentionBackward p{};
  p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out), p.dout = heads(dout);
  p.dq = heads(dq), p.dk = heads(dk), p.dv = heads(dv);
  p.lse = pointer<float>(lse[0]), p.lse_batch = lse[1], p.lse_head = lse[2];
  p.dlse = pointer<float>(dlse), p.delta = pointer<float>(delta);
  p.mask = mask(mask_argument);
  p.scale = scale;
  p.B = sizes[0], p.H = sizes[1], p.Hkv = sizes[2], p.M = sizes[3], p.N = sizes[4], p.D = sizes[5];
  p.bfloat16 = bfloat16, p.aligned = aligned;
  backward(p, stream);
}

// (capacity, warps, rows, shared_bytes)
std::array<int, 4> py_attention_forward_config(int D, int M, int N, int shared_limit) {
  AttentionForwardConfig c = attention_forward_config(D, M, N, shared_limit);
  return {c.capacity, c.warps, c.rows, c.shared_bytes};
}

// (b, h, m, n, keys, masked) of each block of pairs; the mask's tensors are on the CPU.
std::vector<std::array<int, 6>> py_attention_forward_blocks(const MaskArgument& mask_argument, const std::array<int, 6>& sizes,
                                                            int shared_limit) {
  AttentionForward p{};
  p.mask = mask(mask_argument);
  p.B = sizes[0], p.H = sizes[1], p.Hkv = sizes[2], p.M = sizes[3], p.N = sizes[4], p.D = sizes[5];
  std::vector<std::array<int, 6>> blocks;
  for (const AttentionForwardBlock& x : attention_forward_blocks(p, shared_limit))
    blocks.push_back({x.b, x.h, x.m, x.n, x.keys, x.masked});
  return blocks;
}

void py_linear(const MatrixArgument& x, const MatrixArgument& weight, uintptr_t bias, uintptr_t residual, uintptr_t z,
               uintptr_t y, int64_t rows, int K, int F, int activation, bool bfloat16, bool wide_bias, bool wide, bool aligned,
               bool vectors, uintptr_t stream) {
  Linear p{};
  p.x = pointer<void>(x[0]), p.x_row = x[1];
  p.weight = pointer<void>(weight[0]), p.weight_row = weight[1];
  p.bias = pointer<void>(bias), p.residual = pointer<void>(residual), p.z = pointer<void>(z), p.y = pointer<void>(y);
  p.rows = rows, p.K = K, p.F = F;
  p.activation = static_cast<Activation>(activation);
  p.bfloat16 = bfloat16, p.wide_bias = wide_bias, p.wide = wide, p.aligned = aligned, p.vectors = vectors;
  linear(p, stream);
}

void py_activation_backward(const MatrixArgument& dy, uintptr_t z, uintptr_t dz, uintptr_t sums, int64_t rows, int F, int splits,
                            int activation, bool bfloat16, bool vectors, uintptr_t stream) {
  ActivationBackward p{};
  p.dy = pointer<void>(dy[0]), p.dy_row = dy[1];
  p.z = pointer<void>(z), p.dz = pointer<void>(dz), p.sums = pointer<float>(sums);
  p.rows = rows, p.F = F, p.splits = splits;
  p.activation = static_cast<Activation>(activation);
  p.bfloat16 = bfloat16, p.vectors = vectors;
  activation_backward(p, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Launches of fastattn's CUDA kernels. Each raises RuntimeError with the kernel's name if the launch fails.";
  m.def("attention_forward", &py_attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "mask"_a, "scale"_a, "sizes"_a,
        "bfloat16"_a, "aligned"_a, "stream"_a);
  auto backward = [&](const char* name, auto function) {
    m.def(name, function, "q"_a, "k"_a, "v"_a, "out"_a, "dout"_a, "dq"_a, "dk"_a, "dv"_a, "lse"_a, "dlse"_a, "delta"_a, "mask"_a,
          "scale"_a, "sizes"_a, "bfloat16"_a, "aligned"_a, "stream"_a);
  };
  backward("attention_backward_single", &py_attention_backward<attention_backward_single>);
  backward("attention_backward", &py_attention_backward<attention_backward>);
  m.def("attention_forward_config", &py_attention_forward_config, "D"_a, "M"_a, "N"_a, "shared_limit"_a);
  m.def("attention_forward_blocks", &py_attention_forward_blocks, "mask"_a, "sizes"_a, "shared_limit"_a);
  m.def("linear", &py_linear, "x"_a, "weight"_a, "bias"_a, "residual"_a, "z"_a, "y"_a, "rows"_a, "K"_a, "F"_a, "activation"_a,
        "bfloat16"_a, "wide_bias"_a, "wide"_a, "aligned"_a, "vectors"_a, "stream"_a);
  m.def("activation_backward", &py_activation_backward, "dy"_a, "z"_a, "dz"_a, "sums"_a, "rows"_a, "F"_a, "splits"_a,
        "activation"_a, "bfloat16"_a, "vectors"_a, "stream"_a);
  py::dict kernels;  // name: (threads, bytes of shared memory) of a block
  for (const auto& group : {attention_forward_kernels(), attention_backward_single_kernels(), attention_backward_kernels(),
                            linear_kernels(), activation_backward_kernels()})
    for (const Kernel& kernel : group) kernels[kernel.name.c_str()] = py::make_tuple(kernel.threads, kernel.shared_bytes);
  m.attr("kernels") = kernels;
}
