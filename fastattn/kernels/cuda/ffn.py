"""The cuda backend of `linear`: the CUDA C++ kernels of csrc/ffn for the forward, and for the activation's part of the backward.

The plain products of the backward, dx = dz W and dW = dz^T x, go through PyTorch, whose library (cuBLAS) is made for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.cuda import library

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")  # as `enum class Activation` in csrc/ffn/linear.h
ROWS_PER_SPLIT = 128  # of a bias gradient: a function of the shape alone, so that sums are the same on every device
MOST_SPLITS = 256


def unsupported(problem) -> list[str]:
    reasons = library.problems(problem.device)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{problem.dtype} is not served: the CUDA kernels take fp16 and bf16")
    if problem.activation not in ACTIVATIONS:
        reasons.append(f"activation {problem.activation!r} is not in its kernels")
    if max(problem.inputs, problem.outputs) > 2**31 - 1:
        reasons.append("a width is beyond 2^31 - 1")
    return reasons


def notes(problem) -> list[str]:
    return ["backward: the products dz W and dz^T x go through PyTorch (cuBLAS)"]


def forward(x, weight, bias, residual, activation: str | None, train: bool) -> tuple[Tensor, Tensor | None]:
    """y, and z where `train` asks for it and there is an activation."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype == torch.float64:  # the kernel's epilogue is fp32
        y, z = forward(x, weight, bias, None, activation, train)
        return y + residual, z
    outputs = (*x.shape[:-1], weight.shape[0])
    y = x.new_empty(outputs, dtype=dtype)
    z = x.new_empty(outputs) if train and activation is not None else None
    if y.numel() == 0:
        return y, z
    rows, weight = _matrix(x), _matrix(weight.to(x.dtype))
    if bias is not None:
        bias = (bias if bias.dtype == torch.float32 else bias.to(x.dtype)).contiguous()
    residual = None if residual is None else residual.to(dtype).contiguous()
    arguments = {
        "x": (rows.data_ptr(), rows.stride(0)),
        "weight": (weight.data_ptr(), weight.stride(0)),
        **{name: library.address(t) for name, t in (("bias", bias), ("residual", residual), ("z", z), ("y", y))},
        "rows": rows.shape[0],
        "K": rows.shape[1],
        "F": weight.shape[0],
        "activation": ACTIVATIONS.index(activation),
        "bfloat16": x.dtype == torch.bfloat16,
        "wide_bias": bias is not None and bias.dtype == torch.float32,
        "wide": dtype == torch.float32,
        "aligned": library.rows_aligned(rows, weight),
        "vectors": library.rows_aligned(residual, z, y),
    }
    library.launch("linear", arguments, {"x": rows, "weight": weight, "bias": bias, "residual": residual}, {"z": z, "y": y})
    return y, z


def backward(
    dy, x, weight, z, activation: str | None, need_dx: bool, need_dw: bool, need_db: bool,
    before: tuple[Tensor, str] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
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
    rows = _matrix(dy)
    splits = max(1, min(-(-rows.shape[0] // ROWS_PER_SPLIT), MOST_SPLITS))
    sums = dy.new_empty(splits, dy.shape[-1], dtype=torch.float32) if need_sum else None
    dz = None if activation is None else dy.new_empty(dy.shape)
    z = None if activation is None or z is None else z.contiguous()
    if dy.numel() > 0:
        arguments = {
            "dy": (rows.data_ptr(), rows.stride(0)),
            **{name: library.address(t) for name, t in (("z", z), ("dz", dz), ("sums", sums))},
            "rows": rows.shape[0],
            "F": rows.shape[1],
            "splits": splits,
            "activation": ACTIVATIONS.index(activation),
            "bfloat16": dy.dtype == torch.bfloat16,
            "vectors": library.rows_aligned(rows, z, dz),
        }
        library.launch("activation_backward", arguments, {"dy": rows, "z": z}, {"dz": dz, "sums": sums})
    elif sums is not None:
        sums.zero_()
    return dy if dz is None else dz, None if sums is None else sums.sum(0)


def _matrix(x: Tensor) -> Tensor:
    """(..., d) as (rows, d) with adjacent elements in a row: a view where the strides allow it."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
