"""The triton backend of `linear` and `ffn`: what it takes, tile sizes, launches.

Three kernels: `_linear_forward_kernel` in ffn_forward.py; `_linear_dz_kernel` and `_linear_dgrad_kernel` in ffn_backward.py.
Products with nothing after them but a bias (a forward without activation and residual, dW, a plain dx) are PyTorch's: there is
nothing to fuse. Sizes and strides are run-time arguments; what is compiled in is the dtypes, the activation, which of bias,
residual and z there are, and whether rows are made of whole tiles and of units of 16 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastattn.activations import ACTIVATIONS
from fastattn.kernels.triton import activations, ffn_backward, ffn_forward, primitives, product
from fastattn.kernels.triton.activations import NAMES
from fastattn.kernels.triton.ffn_backward import _linear_dgrad_kernel, _linear_dz_kernel
from fastattn.kernels.triton.ffn_forward import _linear_forward_kernel
from fastattn.kernels.triton.launch import (
    GPU,
    LONGEST_ROW,
    Launch,
    gpu_here,
    gpu_of,
    matrix,
    matrix_arguments,
    precision,
    refusals,
    run,
    settle_keys,
)
from fastattn.kernels.triton.tuned import EPILOGUE, LIBRARY, ProductConfig, dtype_class, sources, tiles_of

settle_keys(primitives, activations, product, ffn_forward, ffn_backward)

SQUARE = 128  # a result's size is counted in square tiles of so many rows and columns


class RowsConfig(NamedTuple):
    """Rows and columns of an elementwise tile, tiles per program, warps."""

    BLOCK_M: int
    BLOCK_N: int
    STEPS: int
    num_warps: int
    num_stages: int


ROWS = RowsConfig(16, 128, 8, 4, 1)


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    if problem.activation not in NAMES:
        reasons.append(f"activation {problem.activation!r} is not in its kernels")
    if max(problem.inputs, problem.outputs) >= LONGEST_ROW:
        reasons.append(f"a width of {max(problem.inputs, problem.outputs)} is not below {LONGEST_ROW}")
    return reasons


def notes(problem) -> list[str]:
    found = ["dW, and the dx of a linear that is no part of an ffn, are PyTorch's matrix products (cuBLAS)"]
    if problem.activation is None and not problem.residual:
        return ["the forward has nothing to fuse but the bias: it is PyTorch's linear (cuBLAS)", *found]
    N, K = problem.outputs, problem.inputs
    fields = {"dtype": dtype_class(problem.dtype), "odd": _odd(N, K, problem.dtype), "activation": problem.activation}
    tiles, size = tiles_of(gpu_here()), squares(problem.rows, N)
    rows = [tiles.row("linear_forward", size, library=not problem.residual, **fields, z=z) for z in (False, True)]
    return [*found, f"tiles from {sources(rows)}"]


def forward(x, weight, bias, residual, activation: str | None, train: bool) -> tuple[Tensor, Tensor | None]:
    """y, and z where there is an activation and `train` asks for it."""
    weight = weight.to(x.dtype)
    if activation is None and residual is None:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)), None
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype == torch.float64:  # the kernel adds in fp32
        y, z = forward(x, weight, bias, None, activation, train)
        return y + residual, z
    if residual is None and (found := _library(x, weight, bias, activation, train)) is not None:
        return found
    rows, residual = matrix(x), None if residual is None else matrix(residual)
    y = x.new_empty(rows.shape[0], weight.shape[0], dtype=dtype)
    z = x.new_empty(y.shape) if train and activation is not None else None
    bias = None if bias is None else bias.contiguous()
    run(forward_launch(rows, matrix(weight), bias, residual, y, z, activation, gpu_of(x.device)))
    shape = (*x.shape[:-1], weight.shape[0])
    return y.view(shape), None if z is None else z.view(shape)


def _library(x, weight, bias, activation: str, train: bool) -> tuple[Tensor, Tensor | None] | None:
    """y and z by PyTorch's product, where the table says so and the result is the same up to rounding; else None."""
    if bias is None or bias.dtype != x.dtype or 0 in (x.numel(), weight.numel()):
        return None  # the kernel adds a bias in its own dtype
    (N, K), rows = weight.shape, x.shape[:-1].numel()
    fields = {"dtype": dtype_class(x.dtype), "odd": _odd(N, K, x.dtype), "activation": activation, "z": train}
    choice = tiles_of(gpu_of(x.device)).row("linear_forward", squares(rows, N), library=True, **fields).config
    if choice == LIBRARY or (choice == EPILOGUE and (x.is_cuda or activation == "relu")):  # on a CPU its gelu is the erf form
        return library_linear(choice, x, weight, bias, activation, train)
    return None


def library_linear(choice: str, x, weight, bias, activation: str, train: bool) -> tuple[Tensor, Tensor | None]:
    if choice == EPILOGUE:
        y = torch._addmm_activation(bias, matrix(x), weight.mT, use_gelu=activation == "gelu_tanh")
        return y.view(*x.shape[:-1], weight.shape[0]), None
    z = F.linear(x, weight, bias)
    return ACTIVATIONS[activation][0](z), z if train else None


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, activation: str | None,
    need_dx: bool, need_dw: bool, need_db: bool, before: tuple[Tensor, str] | None = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """dx, dW, db and the sum of dx over rows, as `fastattn.reference.linear_backward` defines them; the sums are fp32."""
    dz, db = matrix(dy), None
    if activation is not None:
        dy, z = dz, matrix(z)
        dz = dy.new_empty(dy.shape)
        sums = dy.new_empty(dz_parts(dy), dy.shape[1], dtype=torch.float32) if need_db else None
        run(dz_launch(dy, z, dz, sums, activation))
        db = None if sums is None else sums.sum(0)
    elif need_db:
        db = dz.sum(0, dtype=torch.float32)
    dw = (dz.mT @ matrix(x)).to(weight.dtype) if need_dw else None
    weight = weight.to(x.dtype)
    if not need_dx:
        return None, dw, db, None
    if before is None:
        return (dz @ weight).view(x.shape), dw, db, None
    (z_before, activation_before), gpu = before, gpu_of(x.device)
    dx = x.new_empty(dz.shape[0], weight.shape[1])
    sums = x.new_empty(dgrad_parts(dz, weight, gpu), dx.shape[1], dtype=torch.float32)
    run(dgrad_launch(dz, matrix(weight), matrix(z_before), dx, sums, activation_before, gpu))
    return dx.view(x.shape), dw, db, sums.sum(0)


def forward_launch(x, weight, bias, residual, y, z, activation: str | None, gpu: GPU) -> Launch:
    """x (M, K), weight (N, K), residual, y and z (M, N); bias (N,)."""
    (M, K), N = x.shape, weight.shape[0]
    config = _config(M, N, K, x.dtype, gpu, "linear_forward", activation=activation, z=z is not None)
    return forward_with(config, x, weight, bias, residual, y, z, activation)


def forward_with(config: ProductConfig, x, weight, bias, residual, y, z, activation: str | None) -> Launch:
    (M, K), N = x.shape, weight.shape[0]
    arguments = matrix_arguments({"x": x, "weight": weight, "residual": residual, "y": y, "z": z}, N=N, K=K)
    arguments.update(bias=bias, M=M, ACTIVATION=activation, WHOLE=K % config.BLOCK_K == 0, PRECISION=precision(x.dtype))
    return Launch(_linear_forward_kernel, _tiles(M, N, config), arguments, config)


def dz_launch(dy, z, dz, sums, activation: str) -> Launch:
    """dy, z and dz (M, N); sums (dz_parts(dy), N) in fp32, or None."""
    M, N = dy.shape
    arguments = matrix_arguments({"dy": dy, "z": z, "dz": dz}, N=N)
    arguments.update(sums=sums, M=M, ACTIVATION=activation)
    return Launch(_linear_dz_kernel, dz_parts(dy) * triton.cdiv(N, ROWS.BLOCK_N), arguments, ROWS)


def dgrad_launch(dy, weight, z, dz, sums, activation: str, gpu: GPU) -> Launch:
    """dy (M, F), weight (F, N), z and dz (M, N), sums (dgrad_parts(dy, weight, gpu), N) in fp32."""
    (M, outputs), N = dy.shape, weight.shape[1]
    config = _config(M, N, outputs, dy.dtype, gpu, "linear_dgrad")
    return dgrad_with(config, dy, weight, z, dz, sums, activation)


def dgrad_with(config: ProductConfig, dy, weight, z, dz, sums, activation: str) -> Launch:
    (M, outputs), N = dy.shape, weight.shape[1]
    arguments = matrix_arguments({"dy": dy, "weight": weight, "z": z, "dz": dz}, N=N, F=outputs)
    arguments.update(sums=sums, M=M, ACTIVATION=activation, WHOLE=outputs % config.BLOCK_K == 0, PRECISION=precision(dy.dtype))
    return Launch(_linear_dgrad_kernel, _tiles(M, N, config), arguments, config)


def dz_parts(dy: Tensor) -> int:
    return triton.cdiv(dy.shape[0], ROWS.BLOCK_M * ROWS.STEPS)


def dgrad_parts(dy: Tensor, weight: Tensor, gpu: GPU) -> int:
    config = _config(dy.shape[0], weight.shape[1], weight.shape[0], dy.dtype, gpu, "linear_dgrad")
    return triton.cdiv(dy.shape[0], config.BLOCK_M)


def _config(M: int, N: int, K: int, dtype: torch.dtype, gpu: GPU, kernel: str, **fields: Any) -> ProductConfig:
    """For an (M, N) product over K."""
    return tiles_of(gpu).row(kernel, squares(M, N), dtype=dtype_class(dtype), odd=_odd(N, K, dtype), **fields).config


def squares(M: int, N: int) -> int:
    """By which a result's size is classed."""
    return triton.cdiv(M, SQUARE) * triton.cdiv(N, SQUARE)


def _odd(N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether rows are not made of units of 16 bytes."""
    unit = 16 // dtype.itemsize
    return bool(N % unit or K % unit)


def _tiles(M: int, N: int, config: ProductConfig) -> int:
    return triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
