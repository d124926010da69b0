"""The backward kernels: one program per head and block of queries makes dQ, one per key head and block of keys makes dK and dV.

For short sequences one program per head of K and V makes all three (`_attention_backward_kernel`). Each recomputes
P = exp(S - lse) from the saved log-sum-exp. Nothing is added across programs, so gradients are deterministic.
With delta = rowsum(dO * O) - dlse: dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO; dK and dV are
summed over the `group` query heads that share a head of K and V.
P and dS are rounded to the dtype for the second products. Where dK and dV are made, scores are key-major, S^T = K Q^T: P^T and
dS^T are then left operands as they are, without a way through shared memory. The kernel of dQ alone has them query-major.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.attention_forward import MASK_RUNTIME
from fastattn.kernels.triton.extras import biased, kept_tile
from fastattn.kernels.triton.primitives import LOG2_E, dot, round_to, rows_of, store_rows
from fastattn.kernels.triton.tiles import (
    key_run,
    list_row,
    listed_run,
    live_keys,
    live_queries,
    mask_bounds,
    partial_place,
    query_run,
    sequence,
    tile_start,
    visible_pairs,
)

RUNTIME = [
    *("q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "dout_b", "dout_h", "dout_l"),
    *MASK_RUNTIME,
]  # integers that must not be compiled in
DQ_RUNTIME = ["out_b", "out_h", "out_l", "dq_b", "dq_h", "dq_l"]
DKDV_RUNTIME = ["dk_b", "dk_h", "dk_l", "dv_b", "dv_h", "dv_l"]


@triton.jit(do_not_specialize=[*RUNTIME, *DQ_RUNTIME])
def _attention_dq_kernel(
    q, k, v, out, dout, dq, lse, dlse, delta,
    prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, query_starts, key_starts, tiles,
    bias, table, buckets, slopes, kept,
    total_queries, total_keys, M, N,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, dout_b, dout_h, dout_l, dq_b, dq_h, dq_l,
    low, high, prefix_high,
    keys_b, keys_n, ids_b, ids_m, key_ids_b, key_ids_n, bits_b, bits_h, bits_m, bits_n, tiles_b, tiles_h, tiles_t,
    bias_b, bias_h, bias_m, bias_n, bias_keys, reach, slopes_b, slopes_h, kept_words, kept_scale,
    scale, H, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    b = head // H
    h = head % H
    q += b * q_b * VECTOR + h * q_h * VECTOR
    k += b * k_b * VECTOR + h // group * k_h * VECTOR
    v += b * v_b * VECTOR + h // group * v_h * VECTOR
    out += b * out_b * VECTOR + h * out_h * VECTOR
    dout += b * dout_b * VECTOR + h * dout_h * VECTOR
    dq += b * dq_b * VECTOR + h * dq_h * VECTOR
    q_l, k_l, v_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR
    out_l, dout_l, dq_l = out_l * VECTOR, dout_l * VECTOR, dq_l * VECTOR
    if query_starts is not None:
        q_begin, M = sequence(query_starts, b, total_queries, M)
        k_begin, N = sequence(key_starts, b, total_keys, N)
        q, out = q + q_begin * q_l, out + q_begin * out_l
        dout, dq = dout + q_begin * dout_l, dq + q_begin * dq_l
        k, v = k + k_begin * k_l, v + k_begin * v_l

    prefix_end, begin, end, first, rows = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N)
    bounds = low, high, prefix_high, prefix_end, begin, end, first, rows
    a = N - M if BOTTOM_RIGHT else 0
    extras = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a
    terms = b, keys, keys_b, keys_n, ids, ids_b, ids_m, key_ids, key_ids_b, key_ids_n, bits, bits_b, bits_h, bits_m, bits_n
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live, row_id = live_queries(m, bounds, terms)
    lse_row = head * M  # of lse, dlse and delta
    if query_starts is not None:
        lse_row = h * total_queries + q_begin
    lse_tile = tl.load(lse + lse_row + m, mask=row_live, other=float("-inf"))
    row_live &= lse_tile > float("-inf")
    q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
    do_tile = rows_of(dout, m, dout_l, row_live, DV, BLOCK_DV)
    delta_tile = _delta(do_tile, out, m, out_l, dlse, lse_row, row_live, DV, BLOCK_DV)
    tl.store(delta + lse_row + m, delta_tile, mask=m < M)
    shift = tl.where(row_live, lse_tile * LOG2_E, float("inf"))

    row = list_row(b, h, block, tiles_b, tiles_h, tiles_t, BLOCK_M)
    if tiles is None:
        start, before, full, partial = key_run(block * BLOCK_M, bounds, keys, BLOCK_M, BLOCK_N)
    else:
        start, before, full, partial = listed_run(tiles + row, N, BLOCK_N, query_starts is not None)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for t in range(full):
        n0 = tile_start(before + t, start, tiles, row, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        k_tile = rows_of(k, n, k_l, None, D, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E)
        p = tl.exp2(biased(s, m, n, row_live, b, h, H, extras, BIAS_UNIT) - shift[:, None])
        dp = dot(do_tile, tl.trans(rows_of(v, n, v_l, None, DV, BLOCK_DV)), PRECISION)
        if kept is not None:
            dp = tl.where(kept_tile(m, n0, row_live, lse_row, kept, kept_words, BLOCK_N), dp * kept_scale, 0.0)
        acc += dot(round_to(p * (dp - delta_tile[:, None]), k_tile.dtype), k_tile, PRECISION)
    for t in range(partial):
        n0 = tile_start(partial_place(t, before, full), start, tiles, row, BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        key_live, key_id = live_keys(n, bounds, terms)
        k_tile = rows_of(k, n, k_l, key_live, D, BLOCK_D)
        s = dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E)
        p = tl.exp2(biased(s, m, n, row_live, b, h, H, extras, BIAS_UNIT) - shift[:, None])
        dp = dot(do_tile, tl.trans(rows_of(v, n, v_l, key_live, DV, BLOCK_DV)), PRECISION)
        if kept is not None:
            dp = tl.where(kept_tile(m, n0, row_live, lse_row, kept, kept_words, BLOCK_N), dp * kept_scale, 0.0)
        visible = visible_pairs(m, n0, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N)
        ds = tl.where(visible, p * (dp - delta_tile[:, None]), 0.0)
        acc += dot(round_to(ds, k_tile.dtype), k_tile, PRECISION)
    store_rows(dq, m, dq_l, m < M, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=[*RUNTIME, *DKDV_RUNTIME])
def _attention_dkdv_kernel(
    q, k, v, dout, dk, dv, lse, delta, columns,
    prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, query_starts, key_starts, tiles,
    bias, table, buckets, slopes, kept,
    total_queries, total_keys, M, N,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    low, high, prefix_high,
    keys_b, keys_n, ids_b, ids_m, key_ids_b, key_ids_n, bits_b, bits_h, bits_m, bits_n, tiles_b, tiles_h, tiles_t,
    bias_b, bias_h, bias_m, bias_n, bias_keys, reach, slopes_b, slopes_h, kept_words, kept_scale,
    scale, H, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks // (H // group)).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % (H // group)).to(tl.int64)
    k += b * k_b * VECTOR + kv_head * k_h * VECTOR
    v += b * v_b * VECTOR + kv_head * v_h * VECTOR
    dk += b * dk_b * VECTOR + kv_head * dk_h * VECTOR
    dv += b * dv_b * VECTOR + kv_head * dv_h * VECTOR
    q_l, k_l, v_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR
    dout_l, dk_l, dv_l = dout_l * VECTOR, dk_l * VECTOR, dv_l * VECTOR
    longest = N
    if query_starts is not None:
        q_begin, M = sequence(query_starts, b, total_queries, M)
        k_begin, N = sequence(key_starts, b, total_keys, N)
        q, dout = q + q_begin * q_l, dout + q_begin * dout_l
        k, v = k + k_begin * k_l, v + k_begin * v_l
        dk, dv = dk + k_begin * dk_l, dv + k_begin * dv_l

    prefix_end, begin, end, first, rows = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N)
    bounds = low, high, prefix_high, prefix_end, begin, end, first, rows
    BIASED: tl.constexpr = bias is not None or table is not None or slopes is not None
    a = N - M if BOTTOM_RIGHT else 0
    extras = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    terms = b, keys, keys_b, keys_n, ids, ids_b, ids_m, key_ids, key_ids_b, key_ids_n, bits, bits_b, bits_h, bits_m, bits_n
    key_live, key_id = live_keys(n, bounds, terms)
    k_tile = rows_of(k, n, k_l, key_live, D, BLOCK_D)
    v_tile = rows_of(v, n, v_l, key_live, DV, BLOCK_DV)
    for h in range(kv_head * group, kv_head * group + group):
        row = (b * H + h) * M  # of lse and delta
        if query_starts is not None:
            row = h * total_queries + q_begin
        q_head = q + b * q_b * VECTOR + h * q_h * VECTOR
        dout_head = dout + b * dout_b * VECTOR + h * dout_h * VECTOR
        listed = list_row(b, h, block, tiles_b, tiles_h, tiles_t, BLOCK_N)
        if tiles is None:
            start, before, full, partial = query_run(block * BLOCK_N, bounds, BLOCK_M, BLOCK_N)
        else:
            start, before, full, partial = listed_run(tiles + listed, M, BLOCK_M)
        sums = tl.zeros([BLOCK_N], tl.float32)
        for t in range(partial):
            m = tile_start(partial_place(t, before, full), start, tiles, listed, BLOCK_M) + tl.arange(0, BLOCK_M)
            row_live, row_id = live_queries(m, bounds, terms)
            lse_tile = tl.load(lse + row + m, mask=row_live, other=float("-inf"))
            if keys is not None or tiles is not None or BIASED:
                row_live &= lse_tile > float("-inf")  # more than bounds may hide a whole row: it may hold NaN
            shift = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2_E)
            q_tile = rows_of(q_head, m, q_l, row_live, D, BLOCK_D)
            do_tile = rows_of(dout_head, m, dout_l, row_live, DV, BLOCK_DV)
            delta_tile = tl.load(delta + row + m, mask=row_live, other=0.0)
            s = biased(_scores_of_keys(k_tile, q_tile, scale, PRECISION), m, n, row_live, b, h, H, extras, BIAS_UNIT, True)
            p = tl.exp2(s - shift[None, :])
            visible = visible_pairs(m, block * BLOCK_N, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N)
            p = tl.where(tl.trans(visible), p, 0.0)
            keep = None
            if kept is not None:
                keep = tl.trans(kept_tile(m, block * BLOCK_N, row_live, row, kept, kept_words, BLOCK_N))
            given = q_tile, do_tile, v_tile, delta_tile
            dk_acc, dv_acc, ds = _accumulate(dk_acc, dv_acc, p, keep, kept_scale, given, PRECISION)
            if columns is not None:
                sums += tl.sum(ds, 1)
        for t in range(full):
            m = tile_start(before + t, start, tiles, listed, BLOCK_M) + tl.arange(0, BLOCK_M)
            row_live = (m >= first) & (m < rows)
            lse_tile = tl.load(lse + row + m, mask=row_live, other=float("-inf"))
            if keys is not None or BIASED:
                row_live &= lse_tile > float("-inf")
            shift = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2_E)
            q_tile = rows_of(q_head, m, q_l, row_live, D, BLOCK_D)
            do_tile = rows_of(dout_head, m, dout_l, row_live, DV, BLOCK_DV)
            delta_tile = tl.load(delta + row + m, mask=row_live, other=0.0)
            s = biased(_scores_of_keys(k_tile, q_tile, scale, PRECISION), m, n, row_live, b, h, H, extras, BIAS_UNIT, True)
            p = tl.exp2(s - shift[None, :])
            keep = None
            if kept is not None:
                keep = tl.trans(kept_tile(m, block * BLOCK_N, row_live, row, kept, kept_words, BLOCK_N))
            given = q_tile, do_tile, v_tile, delta_tile
            dk_acc, dv_acc, ds = _accumulate(dk_acc, dv_acc, p, keep, kept_scale, given, PRECISION)
            if columns is not None:
                sums += tl.sum(ds, 1)
        if columns is not None:
            tl.store(columns + (b * H + h) * longest + n, tl.where(key_live, sums, 0.0), mask=n < longest)
    # a hidden key was read as 0: whatever its row gathered is not a gradient
    store_rows(dk, n, dk_l, n < N, tl.where(key_live[:, None], dk_acc * scale, 0.0), D, BLOCK_D)
    store_rows(dv, n, dv_l, n < N, tl.where(key_live[:, None], _rescaled(dv_acc, kept_scale), 0.0), DV, BLOCK_DV)


@triton.jit(do_not_specialize=[*RUNTIME, *DQ_RUNTIME, *DKDV_RUNTIME])
def _attention_backward_kernel(
    q, k, v, out, dout, dq, dk, dv, lse, dlse, columns,
    prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, query_starts, key_starts, tiles,
    bias, table, buckets, slopes, kept,
    total_queries, total_keys, M, N,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, dout_b, dout_h, dout_l,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    low, high, prefix_high,
    keys_b, keys_n, ids_b, ids_m, key_ids_b, key_ids_n, bits_b, bits_h, bits_m, bits_n, tiles_b, tiles_h, tiles_t,
    bias_b, bias_h, bias_m, bias_n, bias_keys, reach, slopes_b, slopes_h, kept_words, kept_scale,
    scale, H, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All N <= BLOCK_N keys of a head in one program, which therefore makes all of dQ too, and P once. No documents, no bits."""
    b = (tl.program_id(0) // (H // group)).to(tl.int64)
    kv_head = (tl.program_id(0) % (H // group)).to(tl.int64)
    k += b * k_b * VECTOR + kv_head * k_h * VECTOR
    v += b * v_b * VECTOR + kv_head * v_h * VECTOR
    dk += b * dk_b * VECTOR + kv_head * dk_h * VECTOR
    dv += b * dv_b * VECTOR + kv_head * dv_h * VECTOR
    q_l, k_l, v_l, out_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR, out_l * VECTOR
    dout_l, dq_l, dk_l, dv_l = dout_l * VECTOR, dq_l * VECTOR, dk_l * VECTOR, dv_l * VECTOR
    longest = N
    if query_starts is not None:
        q_begin, M = sequence(query_starts, b, total_queries, M)
        k_begin, N = sequence(key_starts, b, total_keys, N)
        q, out = q + q_begin * q_l, out + q_begin * out_l
        dout, dq = dout + q_begin * dout_l, dq + q_begin * dq_l
        k, v = k + k_begin * k_l, v + k_begin * v_l
        dk, dv = dk + k_begin * dk_l, dv + k_begin * dv_l

    prefix_end, begin, end, first, rows = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N)
    bounds = low, high, prefix_high, prefix_end, begin, end, first, rows
    BIASED: tl.constexpr = bias is not None or table is not None or slopes is not None
    a = N - M if BOTTOM_RIGHT else 0
    extras = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a
    terms = b, keys, keys_b, keys_n, None, ids_b, ids_m, None, key_ids_b, key_ids_n, None, bits_b, bits_h, bits_m, bits_n
    n = tl.arange(0, BLOCK_N)
    key_live, key_id = live_keys(n, bounds, terms)
    k_tile = rows_of(k, n, k_l, key_live, D, BLOCK_D)
    v_tile = rows_of(v, n, v_l, key_live, DV, BLOCK_DV)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, _, full, partial = query_run(0, bounds, BLOCK_M, BLOCK_N)
    visited = full + partial
    for h in range(kv_head * group, kv_head * group + group):
        sums = tl.zeros([BLOCK_N], tl.float32)
        row = (b * H + h) * M  # of lse and dlse
        if query_starts is not None:
            row = h * total_queries + q_begin
        q_head = q + b * q_b * VECTOR + h * q_h * VECTOR
        out_head = out + b * out_b * VECTOR + h * out_h * VECTOR
        dout_head = dout + b * dout_b * VECTOR + h * dout_h * VECTOR
        dq_head = dq + b * dq_b * VECTOR + h * dq_h * VECTOR
        for t in range(visited):
            m = start + t * BLOCK_M + tl.arange(0, BLOCK_M)
            row_live, row_id = live_queries(m, bounds, terms)
            lse_tile = tl.load(lse + row + m, mask=row_live, other=float("-inf"))
            if keys is not None or BIASED:
                row_live &= lse_tile > float("-inf")
            shift = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2_E)
            q_tile = rows_of(q_head, m, q_l, row_live, D, BLOCK_D)
            do_tile = rows_of(dout_head, m, dout_l, row_live, DV, BLOCK_DV)
            delta_tile = _delta(do_tile, out_head, m, out_l, dlse, row, row_live, DV, BLOCK_DV)
            s = biased(_scores_of_keys(k_tile, q_tile, scale, PRECISION), m, n, row_live, b, h, H, extras, BIAS_UNIT, True)
            p = tl.exp2(s - shift[None, :])
            visible = visible_pairs(m, 0, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N)
            p = tl.where(tl.trans(visible), p, 0.0)
            keep = None
            if kept is not None:
                keep = tl.trans(kept_tile(m, 0, row_live, row, kept, kept_words, BLOCK_N))
            given = q_tile, do_tile, v_tile, delta_tile
            dk_acc, dv_acc, ds = _accumulate(dk_acc, dv_acc, p, keep, kept_scale, given, PRECISION)
            if columns is not None:
                sums += tl.sum(ds, 1)
            ds = round_to(ds, q_tile.dtype)
            store_rows(dq_head, m, dq_l, m < M, dot(tl.trans(ds), k_tile, PRECISION) * scale, D, BLOCK_D)
        for t in range(tl.cdiv(M, BLOCK_M) - visited):  # queries that see no key
            m = partial_place(t, start // BLOCK_M, visited) * BLOCK_M + tl.arange(0, BLOCK_M)
            store_rows(dq_head, m, dq_l, m < M, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), D, BLOCK_D)
        if columns is not None:
            tl.store(columns + (b * H + h) * longest + n, sums, mask=n < longest)
    store_rows(dk, n, dk_l, n < N, dk_acc * scale, D, BLOCK_D)
    store_rows(dv, n, dv_l, n < N, _rescaled(dv_acc, kept_scale), DV, BLOCK_DV)


@triton.jit
def _delta(do_tile, out, m, out_l, dlse, row, row_live, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """rowsum(dO * O) - dlse, 0 where the row is not live."""
    delta = tl.sum(do_tile.to(tl.float32) * rows_of(out, m, out_l, row_live, DV, BLOCK_DV).to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + row + m, mask=row_live, other=0.0)
    return delta


@triton.jit
def _scores_of_keys(k_tile, q_tile, scale, PRECISION: tl.constexpr):
    """S^T in units of log 2, (BLOCK_N, BLOCK_M)."""
    return dot(k_tile, tl.trans(q_tile), PRECISION) * (scale * LOG2_E)


@triton.jit
def _accumulate(dk_acc, dv_acc, p, keep, kept_scale, given, PRECISION: tl.constexpr):
    """What one block of queries adds, and dS^T; p is P^T, (BLOCK_N, BLOCK_M); keep: which weights dropout keeps, or None."""
    q_tile, do_tile, v_tile, delta_tile = given
    weights = p
    if keep is not None:
        weights = tl.where(keep, p, 0.0)
    dv_acc += dot(round_to(weights, do_tile.dtype), do_tile, PRECISION)
    dp = dot(v_tile, tl.trans(do_tile), PRECISION)
    if keep is not None:
        dp = tl.where(keep, dp * kept_scale, 0.0)
    ds = p * (dp - delta_tile[None, :])
    dk_acc += dot(round_to(ds, q_tile.dtype), q_tile, PRECISION)
    return dk_acc, dv_acc, ds


@triton.jit
def _rescaled(dv_acc, kept_scale):
    if kept_scale is None:
        return dv_acc
    else:
        return dv_acc * kept_scale
