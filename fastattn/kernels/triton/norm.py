"""The triton backend of `add_layer_norm` and `add_rms_norm`: one kernel forward, one backward, each reading its tensors once.

A program holds whole rows in registers, so the variance is taken from the centred row and not from a difference of sums. The
backward walks a fixed number of rows per program and adds up dweight and dbias in fp32 on its way; the partial sums, one row per
program, are added at the end. No atomics: gradients are deterministic. What is compiled in is the dtypes, which tensors there
are, the width's next power of two, and whether rows are made of units of 16 bytes. Where there is a seed, x goes through dropout:
which elements are kept is drawn in the forward, and again in the backward, so that nobody stores it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import LAYER_NORM, RMS_NORM, rescale, threshold
from fastattn.kernels.triton import primitives
from fastattn.kernels.triton.launch import (
    GPU,
    Launch,
    contiguous,
    gpu_of,
    in_rows,
    matrix,
    matrix_arguments,
    ready,
    refusals,
    settle_keys,
)
from fastattn.kernels.triton.philox import kept_tile
from fastattn.kernels.triton.primitives import load_tile, round_to, store_tile
from fastattn.kernels.triton.tuned import Config, dtype_class, tiles_of
from fastattn.planned import memory

# The sums of dweight and dbias of a wider row do not fit into the registers; up to it nothing spills, but for rows of more than
# 4096 elements that are no multiple of 16 bytes, whose backward spills.
WIDEST = 8192
FORWARD_VARYING, BACKWARD_VARYING = 10, 13  # parameters of the kernels that differ from call to call: tensors, then sizes
PARTS, ROWS = 512, 16  # partial sums of dweight: at most so many, of at least so many rows each


@triton.jit(do_not_specialize=["x_m", "residual_m", "M", "N", "threshold", "factor"])
def _norm_forward_kernel(
    x, residual, weight, bias, y, total, mean, rstd, seed, M, x_m, residual_m, eps, threshold, factor, N,
    RMS: tl.constexpr, TAG: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, residual, and dense y and total (M, N), weight and bias (N,), mean and rstd (M,); only x and y must be."""
    N *= VECTOR
    m = tl.program_id(0) * BLOCK_M
    i, j = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    s = load_tile(x, m, 0, x_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    if seed is not None:
        s = tl.where(kept_tile(seed, m, 0, threshold, TAG, BLOCK_M, BLOCK_N), s * factor, 0.0)
    if residual is not None:
        s += load_tile(residual, m, 0, residual_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
        if x.dtype.element_ty == residual.dtype.element_ty:  # else the sum is fp32; it is normalised as it is returned
            s = round_to(s, x.dtype.element_ty).to(tl.float32)
    elif seed is not None:
        s = round_to(s, x.dtype.element_ty).to(tl.float32)
    if total is not None:
        store_tile(total, m, 0, N, M, N, s, BLOCK_M, BLOCK_N)
    if not RMS:
        # rounded, or the compiler would fuse the quotient with the difference, but only where no mean is stored: other bits
        average = tl.div_rn(tl.sum(s, 1), N.to(tl.float32))
        if mean is not None:
            tl.store(mean + i, average, mask=i < M)
        s = tl.where((j < N)[None, :], s - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(s * s, 1) / N + eps)
    if rstd is not None:
        tl.store(rstd + i, scale, mask=i < M)
    s *= scale[:, None]
    if weight is not None:
        s *= tl.load(weight + j, mask=j < N, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        s += tl.load(bias + j, mask=j < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, m, 0, N, M, N, s, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["dy_m", "dtotal_m", "total_m", "M", "N", "steps", "threshold", "factor"])
def _norm_backward_kernel(
    dy, dtotal, total, mean, rstd, weight, dsum, dx, dweight, dbias, seed, M, steps,
    dy_m, dtotal_m, total_m, threshold, factor, N,
    TAG: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dy, dtotal, total and dense dsum (M, N), dweight and dbias (programs, N) in fp32. An RMSNorm has no mean.

    With n = (total - mean) * rstd and g = dy * weight: dsum = rstd * (g - mean(g) - n * mean(g * n)) + dtotal. With a seed
    there is dense dx (M, N), what dropout keeps of dsum.
    """
    N *= VECTOR
    j = tl.arange(0, BLOCK_N)
    dweight_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        m = (tl.program_id(0) * steps + step) * BLOCK_M
        i = m + tl.arange(0, BLOCK_M)
        scale = tl.load(rstd + i, mask=i < M, other=0.0)[:, None]
        normal = load_tile(total, m, 0, total_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
        if mean is not None:
            normal -= tl.load(mean + i, mask=i < M, other=0.0)[:, None]
        normal *= scale  # beyond the width it is not 0, but g is
        g = load_tile(dy, m, 0, dy_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
        if dweight is not None:
            dweight_tile += g * normal
        if dbias is not None:
            dbias_tile += g
        if weight is not None:
            g *= tl.load(weight + j, mask=j < N, other=0.0).to(tl.float32)[None, :]
        grad = g - normal * (tl.sum(g * normal, 1) / N)[:, None]
        if mean is not None:
            grad -= (tl.sum(g, 1) / N)[:, None]
        grad *= scale
        if dtotal is not None:
            grad += load_tile(dtotal, m, 0, dtotal_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
        store_tile(dsum, m, 0, N, M, N, grad, BLOCK_M, BLOCK_N)
        if seed is not None:
            grad = tl.where(kept_tile(seed, m, 0, threshold, TAG, BLOCK_M, BLOCK_N), grad * factor, 0.0)
            store_tile(dx, m, 0, N, M, N, grad, BLOCK_M, BLOCK_N)
    part = tl.program_id(0).to(tl.int64) * N
    if dweight is not None:
        tl.store(dweight + part + j, tl.sum(dweight_tile, 0), mask=j < N)
    if dbias is not None:
        tl.store(dbias + part + j, tl.sum(dbias_tile, 0), mask=j < N)


settle_keys(primitives, sys.modules[__name__])


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    if not 1 <= problem.width <= WIDEST:
        reasons.append(f"width {problem.width} is not in 1..{WIDEST}")
    elif problem.width > WIDEST // 2 and problem.width % 8:
        reasons.append(f"width {problem.width}, beyond {WIDEST // 2}, is no multiple of 8")  # the backward would spill
    return reasons


def forward_plan(
    x, residual, weight, bias, eps: float, rms: bool, keep: bool, statistics: bool,
    seed: Tensor | None = None, dropout: float = 0.0,
):  # fmt: skip
    """For calls like this one, however many rows: (x, residual, weight, bias) -> y, the sum (None without a residual and dropout,
    or where nobody keeps it), mean (None in an RMSNorm) and rstd (both None without `statistics`). A caller that has memory for y
    gives it, and one with dropout the seed."""
    given = x, residual, weight, bias
    if not in_rows(*given):
        plan = forward_plan(*contiguous(*given), eps, rms, keep, statistics, seed, dropout)
        return lambda x, residual, weight, bias, *more: plan(*contiguous(x, residual, weight, bias), *more)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    meta, keep = x.new_empty(x.shape, device="meta"), keep and (residual is not None or seed is not None)
    rstd = meta.new_empty(1, dtype=torch.float32) if statistics else None
    outputs = meta, meta.to(dtype) if keep else None, None if rms else rstd, rstd
    matrices = matrix(x), None if residual is None else matrix(residual)
    launch = forward_launch(*matrices, weight, bias, *outputs, eps, rms, gpu_of(x.device), seed, dropout)
    start, handle, values = ready(launch)
    constants, block, width, same = values[FORWARD_VARYING:], launch.config.BLOCK_M, x.shape[-1], dtype is x.dtype

    def call(x, residual, weight, bias, y=None, seed=None):
        total, mean, rstd, shape = None, None, None, x.shape
        if y is None:
            y = memory(x, shape, width)
        if keep:
            total = memory(x, shape, width) if same else x.new_empty(shape, dtype=dtype)
        if statistics:
            rstd = x.new_empty(*shape[:-1], 1, dtype=torch.float32)
            mean = None if rms else torch.empty_like(rstd)
        rows = x.numel() // width
        if rows:
            tensors = (
                handle(x), None if residual is None else handle(residual), None if weight is None else handle(weight),
                None if bias is None else handle(bias), handle(y), None if total is None else handle(total),
                None if mean is None else handle(mean), None if rstd is None else handle(rstd),
                None if seed is None else handle(seed), rows,
            )  # fmt: skip
            start(-(-rows // block), tensors + constants)
        return y, total, mean, rstd

    return call


def backward_plan(
    dy, dtotal, total, mean, rstd, weight, need_dweight: bool, need_dbias: bool, seed: Tensor | None = None, dropout: float = 0.0
):
    """The same: (dy, dtotal, total, mean, rstd, weight, seed) -> dsum in total's dtype; dweight and dbias in fp32, which
    lie beside each other, None if not needed; with a seed dx in dy's dtype. An RMSNorm has no mean."""
    given = dy, dtotal, total, mean, rstd, weight
    if not in_rows(*given):
        plan = backward_plan(*contiguous(*given), need_dweight, need_dbias, seed, dropout)
        return lambda *given: plan(*contiguous(*given))
    meta = total.new_empty(total.shape, device="meta")
    part = meta.new_empty(1, 1, dtype=torch.float32)
    matrices = matrix(dy), None if dtotal is None else matrix(dtotal), matrix(total)
    sums = part if need_dweight else None, part if need_dbias else None
    drop = None if seed is None else meta.to(dy.dtype), seed, dropout
    launch = backward_launch(*matrices, mean, rstd, weight, meta, *sums, gpu_of(dy.device), *drop)
    start, handle, values = ready(launch)
    constants, config, width = values[BACKWARD_VARYING:], launch.config, total.shape[-1]
    wanted = need_dweight + need_dbias

    def call(dy, dtotal, total, mean, rstd, weight, seed=None):
        dsum = memory(total, total.shape, width)
        dx = None if seed is None else memory(dy, total.shape, width)
        rows = total.numel() // width
        programs, steps = parts_with(config, rows, wanted > 0)
        sums = rstd.new_empty(wanted, programs, width) if wanted else None
        at_sums = None if sums is None else handle(sums)
        at_bias = handle(sums[1]) if wanted == 2 else at_sums if need_dbias else None
        if rows:
            given = (
                handle(dy), None if dtotal is None else handle(dtotal), handle(total), None if mean is None else handle(mean),
                handle(rstd), None if weight is None else handle(weight), handle(dsum), None if dx is None else handle(dx),
                at_sums if need_dweight else None, at_bias, None if seed is None else handle(seed), rows, steps,
            )  # fmt: skip
            start(programs, given + constants)
        found = (None,) if sums is None else sums.sum(1).unbind()
        grads = dsum, found[0] if need_dweight else None, found[-1] if need_dbias else None
        return grads if dx is None else (*grads, dx)

    return call


def forward_launch(
    x, residual, weight, bias, y, total, mean, rstd, eps: float, rms: bool, gpu: GPU, seed=None, dropout: float = 0.0
) -> Launch:
    """x and residual (M, N), y and total dense, of any shape; a seed if there is dropout."""
    config = _config("norm_forward", x.shape[1], x.dtype, gpu)
    return forward_with(config, x, residual, weight, bias, y, total, mean, rstd, eps, rms, seed, dropout)


def forward_with(
    config: Config, x, residual, weight, bias, y, total, mean, rstd, eps: float, rms: bool, seed=None, dropout: float = 0.0
) -> Launch:
    M, N = x.shape
    arguments = matrix_arguments({"x": x, "residual": residual}, N=N)
    arguments.update(weight=weight, bias=bias, y=y, total=total, mean=mean, rstd=rstd, eps=eps, M=M, RMS=rms)
    arguments.update(_dropout(seed, dropout, rms))
    return Launch(_norm_forward_kernel, -(-M // config.BLOCK_M), arguments, config)


def backward_launch(
    dy, dtotal, total, mean, rstd, weight, dsum, dweight, dbias, gpu: GPU, dx=None, seed=None, dropout: float = 0.0
) -> Launch:
    """dy, dtotal and total (M, N), dsum and dx dense, of any shape; dweight and dbias (parts, N) or None; dx and a seed if there
    is dropout."""
    config = _config("norm_backward", total.shape[1], total.dtype, gpu)
    return backward_with(config, dy, dtotal, total, mean, rstd, weight, dsum, dweight, dbias, dx, seed, dropout)


def backward_with(
    config: Config, dy, dtotal, total, mean, rstd, weight, dsum, dweight, dbias, dx=None, seed=None, dropout: float = 0.0
) -> Launch:
    M, N = total.shape
    programs, steps = parts_with(config, M, dweight is not None or dbias is not None)
    arguments = matrix_arguments({"dy": dy, "dtotal": dtotal, "total": total}, N=N)
    arguments.update(weight=weight, dsum=dsum, dx=dx, dweight=dweight, dbias=dbias, mean=mean, rstd=rstd, M=M, steps=steps)
    arguments.update(_dropout(seed, dropout, mean is None))
    return Launch(_norm_backward_kernel, programs, arguments, config)


def _dropout(seed: Tensor | None, p: float, rms: bool) -> dict[str, Any]:
    if seed is None:
        return dict.fromkeys(("seed", "threshold", "factor", "TAG"))
    return {"seed": seed, "threshold": threshold(p), "factor": rescale(p), "TAG": RMS_NORM if rms else LAYER_NORM}


def block_n(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _config(kernel: str, N: int, dtype: torch.dtype, gpu: GPU) -> Config:
    return tiles_of(gpu).row(kernel, 0, block_n=block_n(N), dtype=dtype_class(dtype)).config


def parts(total: Tensor, sums: bool, gpu: GPU) -> tuple[int, int]:
    """Programs of the backward, and the tiles of rows that each walks; they depend on the shape and the table alone."""
    return parts_with(_config("norm_backward", total.shape[1], total.dtype, gpu), total.shape[0], sums)


def parts_with(config: Config, rows: int, sums: bool) -> tuple[int, int]:
    tiles = -(-rows // config.BLOCK_M)
    steps = max(-(-ROWS // config.BLOCK_M), -(-tiles // PARTS)) if sums else 1
    return -(-tiles // steps), steps
