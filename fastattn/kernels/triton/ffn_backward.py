"""The backward kernels of `linear`: dz = dy * act'(z), alone or where dx of the layer behind is made, with its column sums.

Column sums are the bias gradient. A program sums its own rows in fp32 and writes them once; the rows of these partial sums are
added afterwards. How many there are depends on the shape alone, and nothing is added by atomics: gradients are deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.activations import derivative
from fastattn.kernels.triton.philox import kept_tile
from fastattn.kernels.triton.primitives import load_tile, store_tile
from fastattn.kernels.triton.product import product, tile_of


@triton.jit(do_not_specialize=["dy_m", "z_m", "dz_m", "M", "N"])
def _linear_dz_kernel(
    dy, z, dz, sums, M, dy_m, z_m, dz_m, N,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dy, z and dz (M, N); sums (ceil(M / (BLOCK_M * STEPS)), N) or None. One program per that many rows and BLOCK_N columns."""
    N *= VECTOR
    columns = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        m = (part * STEPS + step) * BLOCK_M
        z_tile = load_tile(z, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N)
        tile = load_tile(dy, m, n, dy_m * VECTOR, M, N, BLOCK_M, BLOCK_N) * derivative(z_tile, ACTIVATION)  # 0 outside, as dy is
        store_tile(dz, m, n, dz_m * VECTOR, M, N, tile, BLOCK_M, BLOCK_N)
        total += tile
    if sums is not None:
        i = n + tl.arange(0, BLOCK_N)
        tl.store(sums + part.to(tl.int64) * N + i, tl.sum(total, 0), mask=i < N)


@triton.jit(do_not_specialize=["dy_m", "weight_m", "z_m", "dz_m", "threshold", "factor", "M", "N", "F"])
def _linear_dgrad_kernel(
    dy, weight, z, dz, sums, seed, M, dy_m, weight_m, z_m, dz_m, threshold, factor, N, F,
    ACTIVATION: tl.constexpr, TAG: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz = (dy W) * act'(z), of which dropout keeps what it kept of act(z): dy (M, F), weight (F, N), z and dz (M, N), sums
    (ceil(M / BLOCK_M), N)."""
    N, F = N * VECTOR, F * VECTOR
    row, column = tile_of(M, N, BLOCK_M, BLOCK_N)
    m, n = row * BLOCK_M, column * BLOCK_N
    acc = product(
        dy, weight, m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), dy_m * VECTOR, weight_m * VECTOR, M, N, F,
        WHOLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc *= derivative(load_tile(z, m, n, z_m * VECTOR, M, N, BLOCK_M, BLOCK_N), ACTIVATION)
    if seed is not None:
        acc = tl.where(kept_tile(seed, m, n, threshold, TAG, BLOCK_M, BLOCK_N), acc * factor, 0.0)
    store_tile(dz, m, n, dz_m * VECTOR, M, N, acc, BLOCK_M, BLOCK_N)
    i = n + tl.arange(0, BLOCK_N)
    live = (m + tl.arange(0, BLOCK_M) < M)[:, None]
    tl.store(sums + row.to(tl.int64) * N + i, tl.sum(tl.where(live, acc, 0.0), 0), mask=i < N)
