"""The cuda backend of `linear`: the CUDA C++ kernels of csrc/ffn for the forward, and for the activation's part of the backward.

The plain products of the backward, dx = dz W and dW = dz^T x, go through PyTorch, whose library (cuBLAS) is made for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.kernels.cuda import library

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")  # as `enum class Activation` in csrc/ffn/linear.h
ROWS_PER_SPLIT = 128  # of a bias gradient: a function of the shape alone, so that sums are the same on every device
MOST_SPLITS = 256

Forward = Callable[..., tuple[Tensor, Tensor | None]]  # of x, weight, bias and residual


def unsupported(problem) -> list[str]:
    reasons = library.problems(problem.device)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{problem.dtype} is not served: the CUDA kernels take fp16 and bf16")
    if problem.activation not in ACTIVATIONS:
        reasons.append(f"activation {problem.activation!r} is not in its kernels")
    if problem.dropout:
        reasons.append("dropout is not in its kernels")
    if max(problem.inputs, problem.outputs) > 2**31 - 1:
        reasons.append("a width is beyond 2^31 - 1")
    return reasons


def notes(problem) -> list[str]:
    return ["backward: the products dz W and dz^T x go through PyTorch (cuBLAS)"]


def forward_plan(x, weight, bias, residual, activation: str | None, train: bool) -> Forward:
    """What computes y (..., F) and z of x (..., K), weight, bias and residual: of these, and of others with equal metadata.

    That is shapes, strides, dtype, device and whether addresses are multiples of 16, and which of the tensors there are. The
    number of rows may be another in each call where x is contiguous in all of them, or a matrix of an equal stride from row to
    row, and residual, if there is one, contiguous.
    """
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype == torch.float64:  # the kernel's epilogue is fp32
        return _wide_plan(forward_plan(x, weight, bias, None, activation, train))
    F, with_z = weight.shape[0], train and activation is not None
    read = _read(x, weight, bias, residual, dtype)
    same = [a is b for a, b in zip(read, (x, weight, bias, residual), strict=True)]
    as_given = (same[0] or x.is_contiguous()) and all(same[1:])
    kernel = _linear(x, read, activation, with_z, dtype) if F > 0 else None

    def call(x, weight, bias, residual) -> tuple[Tensor, Tensor | None]:
        outputs = (*x.shape[:-1], F)
        y = x.new_empty(outputs, dtype=dtype)
        z = x.new_empty(outputs) if with_z else None
        if kernel is None or y.numel() == 0:
            return y, z
        tensors = (x, weight, bias, residual) if as_given else _read(x, weight, bias, residual, dtype)
        library.launch(kernel, [t for t in (*tensors, z, y) if t is not None], y.numel() // F)
        return y, z

    return call


def _wide_plan(narrow: Forward) -> Forward:
    """The residual is added to what the plan without one computes."""

    def call(x, weight, bias, residual) -> tuple[Tensor, Tensor | None]:
        y, z = narrow(x, weight, bias, None)
        return y + residual, z

    return call


def _read(x, weight, bias, residual, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, weight, bias and residual as the kernel reads them: matrices, and vectors and the residual contiguous."""
    if bias is not None:
        bias = (bias if bias.dtype == torch.float32 else bias.to(x.dtype)).contiguous()
    residual = None if residual is None else residual.to(dtype).contiguous()
    return _matrix(x), _matrix(weight.to(x.dtype)), bias, residual


def _linear(x: Tensor, read, activation: str | None, with_z: bool, dtype: torch.dtype) -> library.Kernel:
    """The kernel for x and what is read of a call, `_read`'s, with y in `dtype`."""
    rows, weight, bias, residual = read
    K, F = rows.shape[1], weight.shape[0]
    there = {"bias": bias is not None, "residual": residual is not None, "z": with_z}
    request = library.compiled(x.device).Linear(
        x_row=rows.stride(0),
        weight_row=weight.stride(0),
        K=K,
        F=F,
        activation=ACTIVATIONS.index(activation),
        **there,
        bfloat16=x.dtype == torch.bfloat16,
        wide_bias=bias is not None and bias.dtype == torch.float32,
        wide=dtype == torch.float32,
        aligned=library.rows_aligned(rows, rows.stride()[:1]) and library.rows_aligned(weight, weight.stride()[:1]),
        vectors=all(library.strides_aligned(each, (F,)) for each in ((dtype, x.dtype) if with_z else (dtype,)))
        and (residual is None or residual.data_ptr() % 16 == 0),
    )
    names = ("x", "weight", *(name for name, given in there.items() if given), "y")
    return library.Kernel("linear", request, x.device, names, ("z", "y"))


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
    matrix = _matrix(dy)
    rows, F = matrix.shape
    splits = max(1, min(-(-rows // ROWS_PER_SPLIT), MOST_SPLITS))
    tensors = {"dy": matrix}
    if activation is not None:
        assert z is not None
        tensors |= {"z": z.contiguous(), "dz": dy.new_empty(dy.shape)}
    if need_sum:
        tensors["sums"] = dy.new_empty(splits, F, dtype=torch.float32)
    if dy.numel() > 0:
        request = library.compiled(dy.device).ActivationBackward(
            dy_row=matrix.stride(0),
            F=F,
            activation=ACTIVATIONS.index(activation),
            sums=need_sum,
            bfloat16=dy.dtype == torch.bfloat16,
            vectors=all(library.rows_aligned(x, x.stride()[:-1]) for name, x in tensors.items() if name != "sums"),
        )
        kernel = library.Kernel("activation_backward", request, dy.device, tuple(tensors), ("dz", "sums"))
        library.launch(kernel, list(tensors.values()), rows, splits)
    elif need_sum:
        tensors["sums"].zero_()
    return tensors.get("dz", dy), tensors["sums"].sum(0) if need_sum else None


def _matrix(x: Tensor) -> Tensor:
    """(..., d) as (rows, d) with adjacent elements in a row: a view where the strides allow it."""
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
