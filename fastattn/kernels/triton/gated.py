"""The triton backend of gated activations: one kernel forward, one backward, between the two products of an `ffn`.

hidden = act(a) * b with a and b the halves of z. Each reads and writes its tensors once; with a seed the hidden layer goes
through dropout, where it is made and where its gradient is, and nobody stores what is kept.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.activations import GATED
from fastattn.dropout import FFN_HIDDEN, rescale, threshold
from fastattn.kernels.triton import activations, primitives
from fastattn.kernels.triton.activations import NAMES, activate, derivative
from fastattn.kernels.triton.launch import (
    LONGEST_ROW,
    Launch,
    matrix,
    matrix_arguments,
    ready,
    refusals,
    settle_keys,
)
from fastattn.kernels.triton.philox import kept_tile
from fastattn.kernels.triton.primitives import load_tile, store_tile
from fastattn.planned import memory

FORWARD_VARYING, BACKWARD_VARYING = 4, 5  # parameters of the kernels that differ from call to call: tensors, then rows


class GatedConfig(NamedTuple):
    """Rows and columns of a program's tile of the hidden layer, warps."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


CONFIG = GatedConfig(8, 128, 4, 1)


@triton.jit(do_not_specialize=["M", "z_m", "threshold", "factor", "N"])
def _gated_forward_kernel(
    z, hidden, seed, M, z_m, threshold, factor, N,
    ACTIVATION: tl.constexpr, TAG: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z (M, 2 N), dense hidden (M, N)."""
    N *= VECTOR
    columns = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // columns * BLOCK_M, tl.program_id(0) % columns * BLOCK_N
    a = load_tile(z, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    tile = activate(a, ACTIVATION) * load_tile(z + N, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    if seed is not None:
        tile = tl.where(kept_tile(seed, m, n, threshold, TAG, BLOCK_M, BLOCK_N), tile * factor, 0.0)
    store_tile(hidden, m, n, N, M, N, tile, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "dhidden_m", "z_m", "threshold", "factor", "N"])
def _gated_backward_kernel(
    dhidden, z, dz, seed, M, dhidden_m, z_m, threshold, factor, N,
    ACTIVATION: tl.constexpr, TAG: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dhidden (M, N), z and dense dz (M, 2 N): dz = [dh * b * act'(a), dh * act(a)], with dh what is kept of dhidden."""
    N *= VECTOR
    columns = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // columns * BLOCK_M, tl.program_id(0) % columns * BLOCK_N
    dh = load_tile(dhidden, m, n, dhidden_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    if seed is not None:
        dh = tl.where(kept_tile(seed, m, n, threshold, TAG, BLOCK_M, BLOCK_N), dh * factor, 0.0)
    a = load_tile(z, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    b = load_tile(z + N, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
    store_tile(dz, m, n, 2 * N, M, N, dh * b * derivative(a, ACTIVATION), BLOCK_M, BLOCK_N)
    store_tile(dz + N, m, n, 2 * N, M, N, dh * activate(a, ACTIVATION), BLOCK_M, BLOCK_N)


settle_keys(primitives, activations, sys.modules[__name__])


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    if GATED[problem.activation] not in NAMES:
        reasons.append(f"activation {problem.activation!r} is not in its kernels")
    if 2 * problem.columns >= LONGEST_ROW:
        reasons.append(f"twice {problem.columns} columns are not below {LONGEST_ROW}")
    return reasons


def forward_plan(z: Tensor, activation: str, seed: Tensor | None, dropout: float):
    """For calls like this one, however many rows: (z, seed) -> hidden; there is a seed if there is dropout."""
    width = z.shape[-1] // 2
    hidden = torch.empty(1, width, dtype=z.dtype, device="meta")
    start, handle, values = ready(forward_launch(matrix(z.contiguous()), hidden, activation, seed, dropout))
    constants = values[FORWARD_VARYING:]

    def call(z, seed):
        z, hidden = z.contiguous(), memory(z, z.shape, width)
        if hidden.numel():
            rows = hidden.numel() // width
            given = handle(z), handle(hidden), None if seed is None else handle(seed), rows
            start(_programs(rows, width), given + constants)
        return hidden

    return call


def backward_plan(dhidden: Tensor, z: Tensor, activation: str, seed: Tensor | None, dropout: float):
    """The same: (dhidden, z, seed) -> dz."""
    width = z.shape[-1] // 2
    dz = torch.empty(1, 2 * width, dtype=z.dtype, device="meta")
    matrices = matrix(dhidden.contiguous()), matrix(z.contiguous())
    start, handle, values = ready(backward_launch(*matrices, dz, activation, seed, dropout))
    constants = values[BACKWARD_VARYING:]

    def call(dhidden, z, seed):
        dhidden, z, dz = dhidden.contiguous(), z.contiguous(), memory(z, z.shape, 2 * width)
        if dz.numel():
            rows = dhidden.numel() // width
            given = handle(dhidden), handle(z), handle(dz), None if seed is None else handle(seed), rows
            start(_programs(rows, width), given + constants)
        return dz

    return call


def forward_launch(z, hidden, activation: str, seed: Tensor | None = None, dropout: float = 0.0) -> Launch:
    """z (M, 2 N), hidden (M, N), dense; a seed if there is dropout."""
    M, N = z.shape[0], z.shape[1] // 2
    arguments = {**matrix_arguments({"z": z}, N=N), "hidden": hidden, "M": M, **_options(activation, seed, dropout)}
    return Launch(_gated_forward_kernel, _programs(M, N), arguments, CONFIG)


def backward_launch(dhidden, z, dz, activation: str, seed: Tensor | None = None, dropout: float = 0.0) -> Launch:
    """dhidden (M, N), z and dz (M, 2 N), dz dense; a seed if there is dropout."""
    M, N = dhidden.shape
    arguments = {**matrix_arguments({"dhidden": dhidden, "z": z}, N=N), "dz": dz, "M": M, **_options(activation, seed, dropout)}
    return Launch(_gated_backward_kernel, _programs(M, N), arguments, CONFIG)


def _options(activation: str, seed: Tensor | None, p: float) -> dict[str, Any]:
    found = {"ACTIVATION": GATED[activation], **dict.fromkeys(("seed", "threshold", "factor", "TAG"))}
    return found if seed is None else {**found, "seed": seed, "threshold": threshold(p), "factor": rescale(p), "TAG": FFN_HIDDEN}


def _programs(rows: int, width: int) -> int:
    return -(-rows // CONFIG.BLOCK_M) * -(-width // CONFIG.BLOCK_N)
