// The Python module `_cuda`. Tensors arrive as addresses and strides, so it is built without torch and works with every version
// of it. Addresses, sizes and strides were checked by the callers in fastattn/kernels/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

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
using MatrixArgument = std::array<int64_t, 2>;  // address; stride of a row

Heads heads(const HeadsArgument& x) { return {pointer<void>(x[0]), x[1], x[2], x[3]}; }

void py_attention_forward(const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                          uintptr_t lse, uintptr_t key_begin, uintptr_t key_end, uintptr_t query_end,
                          const std::array<int64_t, 3>& keys, std::optional<int> diagonal, float scale,
                          const std::array<int, 5>& sizes, bool bfloat16, bool aligned, uintptr_t stream) {
  AttentionForward p{};
  p.q = heads(q), p.k = heads(k), p.v = heads(v), p.out = heads(out);
  p.lse = pointer<float>(lse);
  p.key_begin = pointer<int32_t>(key_begin), p.key_end = pointer<int32_t>(key_end), p.query_end = pointer<int32_t>(query_end);
  p.keys = pointer<uint8_t>(keys[0]), p.keys_batch = keys[1], p.keys_key = keys[2];
  p.causal = diagonal.has_value(), p.diagonal = diagonal.value_or(0);
  p.scale = scale;
  p.B = sizes[0], p.H = sizes[1], p.M = sizes[2], p.N = sizes[3], p.D = sizes[4];
  p.bfloat16 = bfloat16, p.aligned = aligned;
  attention_forward(p, stream);
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
  m.def("attention_forward", &py_attention_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "key_begin"_a, "key_end"_a,
        "query_end"_a, "keys"_a, "diagonal"_a, "scale"_a, "sizes"_a, "bfloat16"_a, "aligned"_a, "stream"_a);
  m.def("linear", &py_linear, "x"_a, "weight"_a, "bias"_a, "residual"_a, "z"_a, "y"_a, "rows"_a, "K"_a, "F"_a, "activation"_a,
        "bfloat16"_a, "wide_bias"_a, "wide"_a, "aligned"_a, "vectors"_a, "stream"_a);
  m.def("activation_backward", &py_activation_backward, "dy"_a, "z"_a, "dz"_a, "sums"_a, "rows"_a, "F"_a, "splits"_a,
        "activation"_a, "bfloat16"_a, "vectors"_a, "stream"_a);
  py::dict kernels;  // name: (threads, bytes of shared memory) of a block
  for (const auto& group : {attention_forward_kernels(), linear_kernels(), activation_backward_kernels()})
    for (const Kernel& kernel : group) kernels[kernel.name.c_str()] = py::make_tuple(kernel.threads, kernel.shared_bytes);
  m.attr("kernels") = kernels;
}
