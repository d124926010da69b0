"""The forward kernel: online softmax over tiles of keys (Dao et al., 2022), one program per head and block of queries.

exp is exp2 of one multiply-add, which takes the scale and the running maximum. Sums are fp32; P is rounded to the dtype for the
second product, the output once at the end. q and k have D columns, v and out DV; `group` query heads share a head of k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.extras import RUNTIME as EXTRA_RUNTIME
from fastattn.kernels.triton.extras import biased, kept_tile
from fastattn.kernels.triton.primitives import LN_2, LOG2_E, columns_of, dot, round_to, rows_of, store_rows
from fastattn.kernels.triton.tiles import (
    key_run,
    list_row,
    listed_run,
    live_keys,
    live_queries,
    mask_bounds,
    partial_place,
    sequence,
    tile_start,
    visible_pairs,
)

# integers that must not be compiled in: a new length or stride is not a new kernel
MASK_RUNTIME = [
    *("low", "high", "prefix_high", "keys_b", "keys_n", "ids_b", "ids_m", "key_ids_b", "key_ids_n"),
    *("bits_b", "bits_h", "bits_m", "bits_n", "tiles_b", "tiles_h", "tiles_t"),
    *("total_queries", "total_keys", "H", "group", "M", "N"),
    *EXTRA_RUNTIME,
]
RUNTIME = [
    *("q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "out_b", "out_h", "out_l"),
    *MASK_RUNTIME,
]


@triton.jit(do_not_specialize=RUNTIME)
def _attention_forward_kernel(
    q, k, v, out, lse, qkv_bias,
    prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, query_starts, key_starts, tiles,
    bias, table, buckets, slopes, kept,
    total_queries, total_keys, M, N,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    low, high, prefix_high,
    keys_b, keys_n, ids_b, ids_m, key_ids_b, key_ids_n, bits_b, bits_h, bits_m, bits_n, tiles_b, tiles_h, tiles_t,
    bias_b, bias_h, bias_m, bias_n, bias_keys, reach, slopes_b, slopes_h, kept_words, kept_scale,
    scale, H, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    FUSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse is None where nobody wants it. FUSED: whether the scale is one that `_accumulate` may leave to the multiply-add; with a
    bias it is 1, of scores that have both.

    qkv_bias (3, H, D), contiguous, or None; without dropout and groups of heads. That of q is added as q is loaded, and that of v
    to the output, since the weights of a row add up to 1. That of k adds one number to all scores of a row, by which no weight
    changes; lse is without it.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q += b * q_b * VECTOR + h * q_h * VECTOR
    k += b * k_b * VECTOR + h // group * k_h * VECTOR
    v += b * v_b * VECTOR + h // group * v_h * VECTOR
    out += b * out_b * VECTOR + h * out_h * VECTOR
    q_l, k_l = q_l * VECTOR, k_l * VECTOR
    v_l, out_l = v_l * VECTOR, out_l * VECTOR
    if query_starts is not None:
        q_begin, M = sequence(query_starts, b, total_queries, M)
        k_begin, N = sequence(key_starts, b, total_keys, N)
        q, out = q + q_begin * q_l, out + q_begin * out_l
        k, v = k + k_begin * k_l, v + k_begin * v_l

    prefix_end, begin, end, first, rows = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N)
    bounds = low, high, prefix_high, prefix_end, begin, end, first, rows
    terms = b, keys, keys_b, keys_n, ids, ids_b, ids_m, key_ids, key_ids_b, key_ids_n, bits, bits_b, bits_h, bits_m, bits_n
    BIASED: tl.constexpr = bias is not None or table is not None or slopes is not None
    a = N - M if BOTTOM_RIGHT else 0
    extras = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live, row_id = live_queries(m, bounds, terms)
    q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
    if qkv_bias is not None:
        q_tile = round_to(q_tile.to(tl.float32) + columns_of(qkv_bias + h * D, D, BLOCK_D)[None, :], q_tile.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    lse_row = head.to(tl.int64) * M
    if query_starts is not None:
        lse_row = h * total_queries + q_begin
    row = list_row(b, h, block, tiles_b, tiles_h, tiles_t, BLOCK_M)
    if tiles is None:
        start, before, full, partial = key_run(block * BLOCK_M, bounds, keys, BLOCK_M, BLOCK_N)
    else:
        start, before, full, partial = listed_run(tiles + row, N, BLOCK_N, query_starts is not None)
    scale *= LOG2_E
    unit = 1.0 if BIASED else scale  # of a score in units of log 2
    for t in range(full):
        n0 = tile_start(before + t, start, tiles, row, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        s = dot(q_tile, tl.trans(rows_of(k, n, k_l, None, D, BLOCK_D)), PRECISION)
        if BIASED:
            s = biased(s * scale, m, n, row_live, b, h, H, extras, BIAS_UNIT)
        keep = None
        if kept is not None:
            keep = kept_tile(m, n0, row_live, lse_row, kept, kept_words, BLOCK_N)
        v_tile = rows_of(v, n, v_l, None, DV, BLOCK_DV)
        acc, total, top = _accumulate(acc, total, top, s, keep, unit, v_tile, FUSED, PRECISION)
    for t in range(partial):
        n0 = tile_start(partial_place(t, before, full), start, tiles, row, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        key_live, key_id = live_keys(n, bounds, terms)
        s = dot(q_tile, tl.trans(rows_of(k, n, k_l, key_live, D, BLOCK_D)), PRECISION)
        if BIASED:
            s = biased(s * scale, m, n, row_live, b, h, H, extras, BIAS_UNIT)
        keep = None
        if kept is not None:
            keep = kept_tile(m, n0, row_live, lse_row, kept, kept_words, BLOCK_N)
        s = tl.where(visible_pairs(m, n0, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N), s, float("-inf"))
        v_tile = rows_of(v, n, v_l, key_live, DV, BLOCK_DV)
        acc, total, top = _accumulate(acc, total, top, s, keep, unit, v_tile, FUSED, PRECISION)

    total = tl.where(row_live, total, 0.0)
    dead = total == 0.0
    acc = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, total)[:, None])
    if qkv_bias is not None:
        acc = tl.where(dead[:, None], 0.0, acc + columns_of(qkv_bias + (2 * H + h) * D, D, BLOCK_D)[None, :])
    if kept is not None:
        acc *= kept_scale
    store_rows(out, m, out_l, m < M, acc, DV, BLOCK_DV)
    if lse is not None:
        lse_tile = tl.where(dead, float("-inf"), (top * (unit if FUSED else 1.0) + tl.log2(tl.where(dead, 1.0, total))) * LN_2)
        tl.store(lse + lse_row + m, lse_tile, mask=m < M)


@triton.jit
def _accumulate(acc, total, top, s, keep, scale, v_tile, FUSED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: s (BLOCK_M, BLOCK_N), -inf where hidden, times the scale is in units of log 2.

    keep: which weights dropout keeps, or None; their sum is without dropout.

    FUSED: top is the running maximum of s, and a multiply-add takes the scale and the maximum; else top is that of the scaled
    scores. A hidden score stays -inf only times a scale above 0, and what top * scale loses in rounding must be far below the
    exponent of a float.
    """
    if FUSED:
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * scale)  # a row that has seen no key yet
        p = tl.exp2(s * scale - shift[:, None])
        rescale = tl.exp2(top * scale - shift)
    else:
        s = tl.where(s == float("-inf"), s, s * scale)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    acc = acc * rescale[:, None] + dot(round_to(p, v_tile.dtype), v_tile, PRECISION)
    return acc, total, new_top
