"""The forward kernel: online softmax over tiles of keys (Dao et al., 2022), one program per head and block of queries.

Scores are kept in units of log 2, so that exp is exp2 with the scale folded in. Sums are fp32; P is rounded to the dtype for the
second product, the output once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.primitives import LN_2, LOG2_E, dot, round_to, rows_of, store_rows
from fastattn.kernels.triton.tiles import key_tiles, live_keys, mask_ranges, visible_pairs

RUNTIME = [
    *("q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "out_b", "out_h", "out_l"),
    *("keys_b", "keys_n", "pairs_b", "pairs_h", "pairs_m", "pairs_n", "diagonal", "H", "M", "N"),
]  # integers that must not be compiled in: a new length or stride is not a new kernel


@triton.jit(do_not_specialize=RUNTIME)
def _attention_forward_kernel(
    q, k, v, out, lse,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    diagonal, key_begin, key_end, query_end, keys, pairs, keys_b, keys_n, pairs_b, pairs_h, pairs_m, pairs_n,
    scale, H, M, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    head = tl.program_id(0) // blocks
    m0 = tl.program_id(0) % blocks * BLOCK_M
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q += b * q_b * VECTOR + h * q_h * VECTOR
    k += b * k_b * VECTOR + h * k_h * VECTOR
    v += b * v_b * VECTOR + h * v_h * VECTOR
    out += b * out_b * VECTOR + h * out_h * VECTOR
    q_l, k_l = q_l * VECTOR, k_l * VECTOR
    v_l, out_l = v_l * VECTOR, out_l * VECTOR

    begin, end, rows = mask_ranges(key_begin, key_end, query_end, b, M, N)
    m = m0 + tl.arange(0, BLOCK_M)
    row_live = m < rows
    q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    first, partial, full_first, full = key_tiles(begin, end, rows, m0, diagonal, keys, pairs, BLOCK_M, BLOCK_N)
    scale *= LOG2_E
    for t in range(full):
        n = full_first + t * BLOCK_N + tl.arange(0, BLOCK_N)
        s = dot(q_tile, tl.trans(rows_of(k, n, k_l, None, D, BLOCK_D)), PRECISION) * scale
        acc, total, top = _accumulate(acc, total, top, s, rows_of(v, n, v_l, None, D, BLOCK_D), PRECISION)
    for t in range(partial):
        n0 = first + t * BLOCK_N
        n0 += tl.where(n0 >= full_first, full * BLOCK_N, 0)
        n = n0 + tl.arange(0, BLOCK_N)
        key_live = live_keys(n, begin, end, keys, b * keys_b, keys_n)
        s = dot(q_tile, tl.trans(rows_of(k, n, k_l, key_live, D, BLOCK_D)), PRECISION) * scale
        visible = visible_pairs(m, n, row_live, key_live, diagonal, pairs, b * pairs_b + h * pairs_h, pairs_m, pairs_n)
        s = tl.where(visible, s, float("-inf"))
        acc, total, top = _accumulate(acc, total, top, s, rows_of(v, n, v_l, key_live, D, BLOCK_D), PRECISION)

    total = tl.where(row_live, total, 0.0)
    dead = total == 0.0
    acc = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, total)[:, None])
    store_rows(out, m, out_l, m < M, acc, D, BLOCK_D)
    lse_tile = tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * LN_2)
    tl.store(lse + head.to(tl.int64) * M + m, lse_tile, mask=m < M)


@triton.jit
def _accumulate(acc, total, top, s, v_tile, PRECISION: tl.constexpr):
    """One step of the online softmax: s (BLOCK_M, BLOCK_N) in units of log 2, -inf where hidden; top is the running maximum."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None] + dot(round_to(p, v_tile.dtype), v_tile, PRECISION)
    return acc, total, new_top
