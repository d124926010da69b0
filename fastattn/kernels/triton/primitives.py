"""Device helpers that the Triton kernels share, with the interpreter's two mistakes in bf16 worked around in one place."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b accumulated in fp32. The interpreter would multiply the bit patterns of bf16, so there operands are widened."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even. The interpreter truncates to bf16, so there the low half is rounded away beforehand."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def rows_of(base, index, stride, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows `index` (int32) of a (length, D) matrix as (len(index), BLOCK_D); 0 where `live` is false or beyond D."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    if live is None and D == BLOCK_D:
        return tl.load(pointers)
    elif live is None:
        return tl.load(pointers, mask=d[None, :] < D, other=0.0)
    elif D == BLOCK_D:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=live[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def columns_of(base, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """D adjacent elements in fp32, (BLOCK_D,); 0 beyond D."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, index, stride, live, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, round_to(tile, base.dtype.element_ty), mask=live[:, None] & (d[None, :] < D))


@triton.jit
def load_tile(base, m, n, stride, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The (BLOCK_M, BLOCK_N) tile at row m (scalar) and column n of an (M, N) matrix, in fp32; 0 beyond its end.

    The tile's own address is 64 bits wide; inside it 32 are enough, for rows of less than 2^23 elements, and half the registers.
    """
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m + i < M)[:, None] & (n + j < N)[None, :]
    pointers = base + m.to(tl.int64) * stride + n + (i[:, None] * stride + j[None, :])
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, m, n, stride, M, N, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store an fp32 tile where `load_tile` would read it, rounded once to the matrix's dtype."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m + i < M)[:, None] & (n + j < N)[None, :]
    pointers = base + m.to(tl.int64) * stride + n + (i[:, None] * stride + j[None, :])
    tl.store(pointers, round_to(tile, base.dtype.element_ty), mask=inside)
