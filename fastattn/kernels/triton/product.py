"""Tiles of a matrix product: which tile a program makes, and its sum over the reduced index, in fp32.

Rows beyond the end are read as the last row: what a tile holds there is never stored, and no load of a row needs a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.primitives import dot

GROUP = tl.constexpr(8)  # tile rows that are walked together, column by column, so that both operands stay in the L2 cache


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of an (M, N) result: its row and its column, counted in tiles."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = tl.program_id(0) - group * (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def product_transposed(
    a, b, m, n, a_m, b_n, M, N, K,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows m of a (M, K) times rows n of b (N, K): (BLOCK_M, BLOCK_N). WHOLE: K is a multiple of BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_m + k[None, :]
    b_tile = b + tl.minimum(n, N - 1).to(tl.int64)[None, :] * b_n + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if WHOLE:
            acc += dot(tl.load(a_tile), tl.load(b_tile), PRECISION)
        else:
            left = tl.load(a_tile, mask=k[None, :] < K - k0, other=0.0)
            acc += dot(left, tl.load(b_tile, mask=k[:, None] < K - k0, other=0.0), PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    return acc


@triton.jit
def product(
    a, b, m, n, a_m, b_k, M, N, K,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows m of a (M, K) times columns n of b (K, N): (BLOCK_M, BLOCK_N). WHOLE: K is a multiple of BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_m + k[None, :]
    b_tile = b + k.to(tl.int64)[:, None] * b_k + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if WHOLE:
            left = tl.load(a_tile)
            right = tl.load(b_tile, mask=n[None, :] < N, other=0.0)
        else:
            left = tl.load(a_tile, mask=k[None, :] < K - k0, other=0.0)
            right = tl.load(b_tile, mask=(k[:, None] < K - k0) & (n[None, :] < N), other=0.0)
        acc += dot(left, right, PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * b_k
    return acc
