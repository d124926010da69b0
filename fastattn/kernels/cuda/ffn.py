"""The cuda backend of `linear`: CUDA C++ kernels of csrc/ffn for the fused forward and for what the activation adds to the backward.

The plain products of the backward, dx = dz W and dW = dz^T x, go through PyTorch, whose library (cuBLAS) is made for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.cuda import library

ACTIVATIONS = (
    None,
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "silu",
)  # in the order of `enum class Activation` in csrc/ffn/linear.h
ROWS_PER_SPLIT = 128  # of a bias gradient: a function of the shape alone, so that sums are the same on every device
MOST_SPLITS = 256


def unsupported(problem) -> list[str]:
    reasons = library.problems(problem.device)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{problem.dtype} is served by other backends; this one takes fp16 and bf16")
    if max(problem.inputs, problem.outputs) > 2**31 - 1:
        reasons.append("a width is beyond 2^31 - 1")
    return reasons


def notes(problem) -> list[str]:
    return ["backward: the products dz W and dz^T x go through PyTorch (cuBLAS)"]


def forward(x, weight, bias, residual, activation: str | None, train: bool) -> tuple[Tensor, Tensor | None]:
    """y, and z where `train` asks for it and there is an activation."""
    F = weight.shape[0]
    outputs = (*x.shape[:-1], F)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(outputs, dtype=dtype)
    z = x.new_empty(outputs) if train and activation is not None else None
    if y.numel() == 0:
        return y, z
    rows, weight = _matrix(x), _unit_stride(weight.to(x.dtype))
    if bias is not None:
        bias = bias.to(x.dtype if bias.dtype != torch.float32 else torch.float32).contiguous()
    residual = None if residual is None else residual.to(dtype).contiguous()
    if dtype == torch.float64:  # the kernel's epilogue is fp32 at most
        product, z = forward(x, weight, bias, None, activation, train)
        return product + residual, z
    arguments = {
        "x": (rows.data_ptr(), rows.stride(0)),
        "weight": (weight.data_ptr(), weight.stride(0)),
        **{name: library.address(t) for name, t in (("bias", bias), ("residual", residual), ("z", z), ("y", y))},
        **{"rows": rows.shape[0], "K": rows.shape[1], "F": F, "activation": ACTIVATIONS.index(activation)},
        **_dtypes(x, wide_bias=bias is not None and bias.dtype == torch.float32, wide=dtype == torch.float32),
        "aligned": library.rows_aligned(rows, weight),
        "vectors": library.rows_aligned(residual, z, y),
    }
    reads = {"x": rows, "weight": weight, "bias": bias, "residual": residual}
    library.launch("linear", arguments, reads, {"z": z, "y": y})
    return y, z


def backward(
    dy,
    x,
    weight,
    z,
    activation: str | None,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    before: tuple[Tensor, str] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.linear_backward`: dx, dW, db, and for `before` the gradient of its z in place of dx and that one's sum."""
    dz, db = dy, None
    if activation is not None or need_db:
        dz, db = activation_backward(dy, z, activation, need_db)
    dw = (_matrix(dz).mT @ _matrix(x)).to(weight.dtype) if need_dw else None
    dx = dz @ weight.to(dz.dtype) if need_dx else None
    if before is None or dx is None:
        return dx, dw, db, None
    dx, dbefore = activation_backward(dx, *before, need_sum=True)
    return dx, dw, db, dbefore


def activation_backward(dy: Tensor, z: Tensor | None, activation: str | None, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    """dz = dy act'(z), and its sum over rows (F,) in fp32, in one pass; without an activation dz is dy itself."""
    F = dy.shape[-1]
    dz = dy if activation is None else dy.new_empty(dy.shape)
    rows = _matrix(dy)
    splits = max(1, min(-(-rows.shape[0] // ROWS_PER_SPLIT), MOST_SPLITS))
    sums = dy.new_empty(splits, F, dtype=torch.float32) if need_sum else None
    if dy.numel() == 0:
        return dz, None if sums is None else sums.zero_().sum(0)
    z = None if activation is None else z.contiguous()
    written = None if activation is None else dz
    arguments = {
        "dy": (rows.data_ptr(), rows.stride(0)),
        **{name: library.address(t) for name, t in (("z", z), ("dz", written), ("sums", sums))},
        **{"rows": rows.shape[0], "F": F, "splits": splits, "activation": ACTIVATIONS.index(activation)},
        "bfloat16": dy.dtype == torch.bfloat16,
        "vectors": library.rows_aligned(rows, z, written),
    }
    library.launch("activation_backward", arguments, {"dy": rows, "z": z}, {"dz": written, "sums": sums})
    return dz, None if sums is None else sums.sum(0)


def _dtypes(x: Tensor, wide_bias: bool, wide: bool) -> dict[str, bool]:
    return {"bfloat16": x.dtype == torch.bfloat16, "wide_bias": wide_bias, "wide": wide}


def _matrix(x: Tensor) -> Tensor:
    """(..., d) as (rows, d) with adjacent elements in a row: a view where the strides allow it."""
    return _unit_stride(x.reshape(-1, x.shape[-1]))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
