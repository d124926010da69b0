"""The triton backend of `linear` and `ffn`: what it takes, tile sizes, launches.

Three kernels: `_linear_forward_kernel` in ffn_forward.py; `_linear_dz_kernel` and `_linear_dgrad_kernel` in ffn_backward.py.
Products with nothing after them but a bias (a forward without activation and residual, dW, a plain dx) are PyTorch's: there is
nothing to fuse. Sizes and strides are run-time arguments; what is compiled in is the dtypes, the activation, which of bias,
residual, z and a seed there are, and whether rows are made of whole tiles and of units of 16 bytes. With a seed the hidden layer
of an ffn goes through dropout, where it is made and where its gradient is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.activations import ACTIVATIONS
from fastattn.dropout import FFN_HIDDEN, rescale, threshold
from fastattn.kernels.triton import activations, ffn_backward, ffn_forward, primitives, product
from fastattn.kernels.triton.activations import NAMES
from fastattn.kernels.triton.ffn_backward import _linear_dgrad_kernel, _linear_dz_kernel
from fastattn.kernels.triton.ffn_forward import _linear_forward_kernel
from fastattn.kernels.triton.launch import (
    GPU,
    LONGEST_ROW,
    Launch,
    contiguous,
    gpu_here,
    gpu_of,
    in_rows,
    matrix,
    matrix_arguments,
    precision,
    ready,
    refusals,
    settle_keys,
)
from fastattn.kernels.triton.tuned import EPILOGUE, LIBRARY, ProductConfig, dtype_class, sources, tiles_of
from fastattn.planned import memory

settle_keys(primitives, activations, product, ffn_forward, ffn_backward)

FORWARD_VARYING, DZ_VARYING, DGRAD_VARYING = 8, 5, 7  # parameters of the kernels that differ from call to call
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


def forward_plan(
    x, weight, bias, residual, activation: str | None, train: bool, seed: Tensor | None = None, dropout: float = 0.0
):
    """For calls like this one, however many rows: (x, weight, bias, residual) -> y, and z where there is an activation and
    `train` asks for it. With dropout, which an activation precedes, the seed is the fifth tensor."""
    if weight.dtype != x.dtype:
        plan = forward_plan(x, weight.to(x.dtype), bias, residual, activation, train, seed, dropout)
        return lambda x, weight, bias, residual, *seed: plan(x, weight.to(x.dtype), bias, residual, *seed)
    if activation is None and residual is None:
        if bias is None or bias.dtype is x.dtype:
            return lambda x, weight, bias, _: (F.linear(x, weight, bias), None)
        return lambda x, weight, bias, _: (F.linear(x, weight, bias.to(x.dtype)), None)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype == torch.float64:  # the kernel adds in fp32
        plan = forward_plan(x, weight, bias, None, activation, train)

        def wide(x, weight, bias, residual):
            y, z = plan(x, weight, bias, None)
            return y + residual, z

        return wide
    given = x, weight, bias, residual
    if not in_rows(*given):
        plan = forward_plan(*contiguous(*given), activation, train, seed, dropout)
        return lambda *given: plan(*contiguous(*given))
    return _by_rows(weight, dtype, activation, train and activation is not None, dropout)


def _by_rows(weight: Tensor, dtype: torch.dtype, activation: str | None, with_z: bool, dropout: float):
    """By the sizes of results and then by the row of the table that a size has: kernels, or PyTorch's product."""
    sizes: dict[int, Any] = {}
    made: dict[Any, Any] = {}
    (N, K), columns = weight.shape, squares(1, weight.shape[0])

    def call(x, weight, bias, residual, seed=None):
        shape = x.shape
        rows = shape[0] * shape[1] if len(shape) == 3 else shape[:-1].numel()
        size = -(-rows // SQUARE) * columns
        compute = sizes.get(size)
        if compute is None:
            fused = residual is not None or seed is not None
            choice = None if fused else _library_choice(x, weight, bias, activation, with_z)
            if choice is None:
                choice = _config(rows, N, K, x.dtype, gpu_of(x.device), "linear_forward", activation=activation, z=with_z)
            if choice not in made:
                made[choice] = _computing(choice, x, weight, bias, residual, dtype, activation, with_z, seed, dropout)
            compute = sizes[size] = made[choice]
        return compute(x, weight, bias, residual, seed, shape, rows)

    return call


def _computing(choice, x, weight, bias, residual, dtype: torch.dtype, activation: str | None, with_z: bool, seed, dropout: float):
    if isinstance(choice, str):
        return lambda x, weight, bias, *_: library_linear(choice, x, weight, bias, activation, with_z)
    N, same = weight.shape[0], dtype is x.dtype
    meta = torch.empty(1, N, dtype=dtype, device="meta")
    matrices = matrix(x), matrix(weight), bias, None if residual is None else matrix(residual)
    outputs = meta, meta.to(x.dtype) if with_z else None
    start, handle, values = ready(forward_with(choice, *matrices, *outputs, activation, seed, dropout))
    constants, block, columns = values[FORWARD_VARYING:], choice.BLOCK_M, -(-N // choice.BLOCK_N)

    def compute(x, weight, bias, residual, seed, shape, rows):
        y = memory(x, shape, N) if same else x.new_empty(*shape[:-1], N, dtype=dtype)
        z = memory(x, shape, N) if with_z else None
        if rows:
            at_bias, at_residual = None if bias is None else handle(bias), None if residual is None else handle(residual)
            at_z, at_seed = None if z is None else handle(z), None if seed is None else handle(seed)
            given = handle(x), handle(weight), at_bias, at_residual, handle(y), at_z, at_seed, rows
            start(-(-rows // block) * columns, given + constants)
        return y, z

    return compute


def _library_choice(x, weight, bias, activation: str | None, with_z: bool) -> str | None:
    """PyTorch's product, where the table says so and the result is the same up to rounding."""
    if bias is None or bias.dtype != x.dtype or 0 in (x.numel(), weight.numel()):
        return None  # the kernel adds a bias in its own dtype
    (N, K), rows = weight.shape, x.shape[:-1].numel()
    fields = {"dtype": dtype_class(x.dtype), "odd": _odd(N, K, x.dtype), "activation": activation, "z": with_z}
    choice = tiles_of(gpu_of(x.device)).row("linear_forward", squares(rows, N), library=True, **fields).config
    if choice == LIBRARY or (choice == EPILOGUE and (x.is_cuda or activation == "relu")):  # on a CPU its gelu is the erf form
        return choice
    return None


def library_linear(choice: str, x, weight, bias, activation: str, train: bool) -> tuple[Tensor, Tensor | None]:
    if choice == EPILOGUE:
        y = torch._addmm_activation(bias, matrix(x), weight.mT, use_gelu=activation == "gelu_tanh")
        return y.view(*x.shape[:-1], weight.shape[0]), None
    z = F.linear(x, weight, bias)
    return ACTIVATIONS[activation][0](z), z if train else None


def backward_plan(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, activation: str | None,
    need_dx: bool, need_dw: bool, need_db: bool, before: tuple[Tensor, str] | None = None, dropout: float = 0.0,
):  # fmt: skip
    """The same: (dy, x, weight, z, the z before) -> dx, dW, db and the sum of dx over rows, as
    `fastattn.reference.linear_backward` defines them; the sums are fp32. With dropout the seed is the sixth tensor."""
    make_dz = None if activation is None else _dz_plan(dy, z, activation, need_db)
    dgrad = _dgrad_plan(before[1], dropout) if need_dx and before is not None else None
    as_dz, as_x, as_weight, as_before = _flat(dy), _flat(x), _flat(weight), matrix if before is None else _flat(before[0])
    cast, whole = weight.dtype is not x.dtype, x.dim() == 2

    def call(dy, x, weight, z, z_before, seed=None):
        dx = dw = db = sums = None
        if make_dz is not None:
            dz, db = make_dz(dy, z)
        else:
            dz = as_dz(dy)
            if need_db:
                db = dz.sum(0, dtype=torch.float32)
        if need_dw:
            dw = torch.mm(dz.t(), as_x(x))
        if need_dx:
            weight = weight.to(x.dtype) if cast else weight
            if dgrad is None:
                dx = torch.mm(dz, weight)
            else:
                dx, sums = dgrad(dz, as_weight(weight), as_before(z_before), seed)
            dx = dx if whole else dx.view_as(x)
        return dx, dw.to(weight.dtype) if cast and need_dw else dw, db, sums

    return call


def _flat(x: Tensor) -> Callable[[Tensor], Tensor]:
    """`matrix`, for tensors that lie as x does."""
    if x.dim() == 2 and in_rows(x):
        return lambda x: x
    width = x.shape[-1]
    return (lambda x: x.view(-1, width)) if width and x.is_contiguous() else matrix


def _dz_plan(dy: Tensor, z: Tensor, activation: str, need_db: bool):
    """(dy, z) -> dz as a matrix and its sum over rows."""
    if not in_rows(dy, z):
        plan = _dz_plan(dy.contiguous(), z.contiguous(), activation, need_db)
        return lambda dy, z: plan(dy.contiguous(), z.contiguous())
    N = dy.shape[-1]
    meta = torch.empty(1, N, dtype=dy.dtype, device="meta")
    start, handle, values = ready(dz_launch(matrix(dy), matrix(z), meta, meta.float() if need_db else None, activation))
    constants, columns = values[DZ_VARYING:], -(-N // ROWS.BLOCK_N)

    def call(dy, z):
        rows = dy.numel() // N if N else dy.shape[:-1].numel()
        dz = dy.new_empty(rows, N)
        parts = dz_parts(dz)
        sums = dy.new_empty(parts, N, dtype=torch.float32) if need_db else None
        if rows:
            given = handle(dy), handle(z), handle(dz), None if sums is None else handle(sums), rows
            start(parts * columns, given + constants)
        return dz, None if sums is None else sums.sum(0)

    return call


def _dgrad_plan(activation: str, dropout: float):
    """(dy, weight, z), matrices of one layout, and a seed or None -> dz = (dy W) * act'(z) and its sum over rows, by the kernel
    for each config that the rows ask for."""
    sizes: dict[int, Any] = {}
    made: dict[ProductConfig, Any] = {}

    def prepare(dy, weight, z, seed, size):
        (rows, outputs), N = dy.shape, weight.shape[1]
        config = _config(rows, N, outputs, dy.dtype, gpu_of(dy.device), "linear_dgrad")
        if config not in made:
            dz = torch.empty(1, N, dtype=dy.dtype, device="meta")
            matrices = matrix(dy), matrix(weight), matrix(z), dz, dz.float()
            start, handle, values = ready(dgrad_with(config, *matrices, activation, seed, dropout))
            made[config] = start, handle, values[DGRAD_VARYING:], config.BLOCK_M, -(-N // config.BLOCK_N)
        sizes[size] = made[config]
        return made[config]

    def call(dy, weight, z, seed):
        rows, N = z.shape
        size = squares(rows, N)
        start, handle, constants, block, columns = sizes.get(size) or prepare(dy, weight, z, seed, size)
        parts = -(-rows // block)
        dz, sums = dy.new_empty(rows, N), dy.new_empty(parts, N, dtype=torch.float32)
        if rows:
            at_seed = None if seed is None else handle(seed)
            given = handle(dy), handle(weight), handle(z), handle(dz), handle(sums), at_seed, rows
            start(parts * columns, given + constants)
        return dz, sums.sum(0)

    return call


def forward_launch(x, weight, bias, residual, y, z, activation: str | None, gpu: GPU, seed=None, dropout: float = 0.0) -> Launch:
    """x (M, K), weight (N, K), residual, y and z (M, N); bias (N,); a seed if there is dropout."""
    (M, K), N = x.shape, weight.shape[0]
    config = _config(M, N, K, x.dtype, gpu, "linear_forward", activation=activation, z=z is not None)
    return forward_with(config, x, weight, bias, residual, y, z, activation, seed, dropout)


def forward_with(
    config: ProductConfig, x, weight, bias, residual, y, z, activation: str | None, seed=None, dropout: float = 0.0
) -> Launch:
    (M, K), N = x.shape, weight.shape[0]
    arguments = matrix_arguments({"x": x, "weight": weight, "residual": residual, "y": y, "z": z}, N=N, K=K)
    arguments.update(bias=bias, M=M, ACTIVATION=activation, WHOLE=K % config.BLOCK_K == 0, PRECISION=precision(x.dtype))
    arguments.update(_dropout(seed, dropout))
    return Launch(_linear_forward_kernel, _tiles(M, N, config), arguments, config)


def dz_launch(dy, z, dz, sums, activation: str) -> Launch:
    """dy, z and dz (M, N); sums (dz_parts(dy), N) in fp32, or None."""
    M, N = dy.shape
    arguments = matrix_arguments({"dy": dy, "z": z, "dz": dz}, N=N)
    arguments.update(sums=sums, M=M, ACTIVATION=activation)
    return Launch(_linear_dz_kernel, dz_parts(dy) * -(-N // ROWS.BLOCK_N), arguments, ROWS)


def dgrad_launch(dy, weight, z, dz, sums, activation: str, gpu: GPU, seed=None, dropout: float = 0.0) -> Launch:
    """dy (M, F), weight (F, N), z and dz (M, N), sums (dgrad_parts(dy, weight, gpu), N) in fp32; a seed if there is dropout."""
    (M, outputs), N = dy.shape, weight.shape[1]
    config = _config(M, N, outputs, dy.dtype, gpu, "linear_dgrad")
    return dgrad_with(config, dy, weight, z, dz, sums, activation, seed, dropout)


def dgrad_with(config: ProductConfig, dy, weight, z, dz, sums, activation: str, seed=None, dropout: float = 0.0) -> Launch:
    (M, outputs), N = dy.shape, weight.shape[1]
    arguments = matrix_arguments({"dy": dy, "weight": weight, "z": z, "dz": dz}, N=N, F=outputs)
    arguments.update(sums=sums, M=M, ACTIVATION=activation, WHOLE=outputs % config.BLOCK_K == 0, PRECISION=precision(dy.dtype))
    arguments.update(_dropout(seed, dropout))
    return Launch(_linear_dgrad_kernel, _tiles(M, N, config), arguments, config)


def _dropout(seed: Tensor | None, p: float) -> dict[str, Any]:
    if seed is None:
        return dict.fromkeys(("seed", "threshold", "factor", "TAG"))
    return {"seed": seed, "threshold": threshold(p), "factor": rescale(p), "TAG": FFN_HIDDEN}


def dz_parts(dy: Tensor) -> int:
    return -(-dy.shape[0] // (ROWS.BLOCK_M * ROWS.STEPS))


def dgrad_parts(dy: Tensor, weight: Tensor, gpu: GPU) -> int:
    config = _config(dy.shape[0], weight.shape[1], weight.shape[0], dy.dtype, gpu, "linear_dgrad")
    return -(-dy.shape[0] // config.BLOCK_M)


def _config(M: int, N: int, K: int, dtype: torch.dtype, gpu: GPU, kernel: str, **fields: Any) -> ProductConfig:
    """For an (M, N) product over K."""
    return tiles_of(gpu).row(kernel, squares(M, N), dtype=dtype_class(dtype), odd=_odd(N, K, dtype), **fields).config


def squares(M: int, N: int) -> int:
    """By which a result's size is classed."""
    return -(-M // SQUARE) * -(-N // SQUARE)


def _odd(N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether rows are not made of units of 16 bytes."""
    unit = 16 // dtype.itemsize
    return bool(N % unit or K % unit)


def _tiles(M: int, N: int, config: ProductConfig) -> int:
    return -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N)
