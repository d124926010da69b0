"""The backward kernels: one program per head and block of queries makes dQ, one per head and block of keys makes dK and dV.

Each recomputes P = exp(S - lse) from the saved log-sum-exp. Nothing is added across programs, so gradients are deterministic.
With delta = rowsum(dO * O) - dlse: dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
P and dS are rounded to the dtype for the second products. Scores are query-major in both kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.triton.primitives import LOG2_E, dot, round_to, rows_of, store_rows
from fastattn.kernels.triton.tiles import key_tiles, live_keys, mask_ranges, query_tiles, visible_pairs

RUNTIME = [
    *("q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "dout_b", "dout_h", "dout_l"),
    *("keys_b", "keys_n", "pairs_b", "pairs_h", "pairs_m", "pairs_n", "diagonal", "H", "M", "N"),
]  # integers that must not be compiled in: a new length or stride is not a new kernel


@triton.jit(do_not_specialize=[*RUNTIME, "out_b", "out_h", "out_l", "dq_b", "dq_h", "dq_l"])
def _attention_dq_kernel(
    q, k, v, out, dout, dq, lse, dlse, delta,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, dout_b, dout_h, dout_l, dq_b, dq_h, dq_l,
    diagonal, key_begin, key_end, query_end, keys, pairs, keys_b, keys_n, pairs_b, pairs_h, pairs_m, pairs_n,
    scale, H, M, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    m0 = tl.program_id(0) % blocks * BLOCK_M
    b = head // H
    h = head % H
    q += b * q_b * VECTOR + h * q_h * VECTOR
    k += b * k_b * VECTOR + h * k_h * VECTOR
    v += b * v_b * VECTOR + h * v_h * VECTOR
    out += b * out_b * VECTOR + h * out_h * VECTOR
    dout += b * dout_b * VECTOR + h * dout_h * VECTOR
    dq += b * dq_b * VECTOR + h * dq_h * VECTOR
    q_l, k_l, v_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR
    out_l, dout_l, dq_l = out_l * VECTOR, dout_l * VECTOR, dq_l * VECTOR

    begin, end, rows = mask_ranges(key_begin, key_end, query_end, b, M, N)
    m = m0 + tl.arange(0, BLOCK_M)
    row_live = m < rows
    q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
    do_tile = rows_of(dout, m, dout_l, row_live, D, BLOCK_D)
    lse_tile = tl.load(lse + head * M + m, mask=row_live, other=float("-inf"))
    dead = lse_tile == float("-inf")
    delta_tile = tl.sum(do_tile.to(tl.float32) * rows_of(out, m, out_l, row_live, D, BLOCK_D).to(tl.float32), 1)
    if dlse is not None:
        delta_tile -= tl.load(dlse + head * M + m, mask=row_live, other=0.0)
    delta_tile = tl.where(dead, 0.0, delta_tile)
    tl.store(delta + head * M + m, delta_tile, mask=m < M)
    lse_tile = tl.where(dead, float("inf"), lse_tile * LOG2_E)

    first, partial, full_first, full = key_tiles(begin, end, rows, m0, diagonal, keys, pairs, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for t in range(full):
        n = full_first + t * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = rows_of(k, n, k_l, None, D, BLOCK_D)
        p = tl.exp2(dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E) - lse_tile[:, None])
        dp = dot(do_tile, tl.trans(rows_of(v, n, v_l, None, D, BLOCK_D)), PRECISION)
        acc += dot(round_to(p * (dp - delta_tile[:, None]), k_tile.dtype), k_tile, PRECISION)
    for t in range(partial):
        n0 = first + t * BLOCK_N
        n0 += tl.where(n0 >= full_first, full * BLOCK_N, 0)
        n = n0 + tl.arange(0, BLOCK_N)
        key_live = live_keys(n, begin, end, keys, b * keys_b, keys_n)
        k_tile = rows_of(k, n, k_l, key_live, D, BLOCK_D)
        p = tl.exp2(dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E) - lse_tile[:, None])
        dp = dot(do_tile, tl.trans(rows_of(v, n, v_l, key_live, D, BLOCK_D)), PRECISION)
        visible = visible_pairs(m, n, row_live, key_live, diagonal, pairs, b * pairs_b + h * pairs_h, pairs_m, pairs_n)
        ds = tl.where(visible, p * (dp - delta_tile[:, None]), 0.0)
        acc += dot(round_to(ds, k_tile.dtype), k_tile, PRECISION)
    store_rows(dq, m, dq_l, m < M, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=[*RUNTIME, "dk_b", "dk_h", "dk_l", "dv_b", "dv_h", "dv_l"])
def _attention_dkdv_kernel(
    q, k, v, dout, dk, dv, lse, delta,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    diagonal, key_begin, key_end, query_end, keys, pairs, keys_b, keys_n, pairs_b, pairs_h, pairs_m, pairs_n,
    scale, H, M, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    b = head // H
    h = head % H
    q += b * q_b * VECTOR + h * q_h * VECTOR
    k += b * k_b * VECTOR + h * k_h * VECTOR
    v += b * v_b * VECTOR + h * v_h * VECTOR
    dout += b * dout_b * VECTOR + h * dout_h * VECTOR
    dk += b * dk_b * VECTOR + h * dk_h * VECTOR
    dv += b * dv_b * VECTOR + h * dv_h * VECTOR
    q_l, k_l, v_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR
    dout_l, dk_l, dv_l = dout_l * VECTOR, dk_l * VECTOR, dv_l * VECTOR
    lse += head * M
    delta += head * M
    pairs_head = b * pairs_b + h * pairs_h

    begin, end, rows = mask_ranges(key_begin, key_end, query_end, b, M, N)
    n = n0 + tl.arange(0, BLOCK_N)
    key_live = live_keys(n, begin, end, keys, b * keys_b, keys_n)
    k_tile = rows_of(k, n, k_l, key_live, D, BLOCK_D)
    v_tile = rows_of(v, n, v_l, key_live, D, BLOCK_D)
    first, partial, full = query_tiles(begin, end, rows, n0, diagonal, pairs, BLOCK_M, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for t in range(partial):
        m = first + t * BLOCK_M + tl.arange(0, BLOCK_M)
        row_live = m < rows
        if diagonal is not None:
            row_live &= m + diagonal >= begin  # an earlier row sees no key: its q and dO may hold NaN
        lse_tile = tl.load(lse + m, mask=row_live, other=float("-inf"))
        if pairs is not None:
            row_live &= lse_tile > float("-inf")
        q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
        do_tile = rows_of(dout, m, dout_l, row_live, D, BLOCK_D)
        delta_tile = tl.load(delta + m, mask=row_live, other=0.0)
        p = _weights(q_tile, k_tile, lse_tile, scale, PRECISION)
        p = tl.where(visible_pairs(m, n, row_live, key_live, diagonal, pairs, pairs_head, pairs_m, pairs_n), p, 0.0)
        dk_acc, dv_acc = _accumulate(dk_acc, dv_acc, p, q_tile, do_tile, v_tile, delta_tile, PRECISION)
    for t in range(full):
        m = first + (partial + t) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_live = m < rows
        lse_tile = tl.load(lse + m, mask=row_live, other=float("-inf"))
        q_tile = rows_of(q, m, q_l, row_live, D, BLOCK_D)
        do_tile = rows_of(dout, m, dout_l, row_live, D, BLOCK_D)
        delta_tile = tl.load(delta + m, mask=row_live, other=0.0)
        p = _weights(q_tile, k_tile, lse_tile, scale, PRECISION)
        dk_acc, dv_acc = _accumulate(dk_acc, dv_acc, p, q_tile, do_tile, v_tile, delta_tile, PRECISION)
    # a hidden key was read as 0: whatever its row gathered is not a gradient
    store_rows(dk, n, dk_l, n < N, tl.where(key_live[:, None], dk_acc * scale, 0.0), D, BLOCK_D)
    store_rows(dv, n, dv_l, n < N, tl.where(key_live[:, None], dv_acc, 0.0), D, BLOCK_D)


@triton.jit
def _weights(q_tile, k_tile, lse_tile, scale, PRECISION: tl.constexpr):
    """P = exp(S - lse), (BLOCK_M, BLOCK_N); a row with lse -inf, or beyond the end, has weight 0 everywhere."""
    shift = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2_E)
    return tl.exp2(dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E) - shift[:, None])


@triton.jit
def _accumulate(dk_acc, dv_acc, p, q_tile, do_tile, v_tile, delta_tile, PRECISION: tl.constexpr):
    dv_acc += dot(tl.trans(round_to(p, do_tile.dtype)), do_tile, PRECISION)
    dp = dot(do_tile, tl.trans(v_tile), PRECISION)
    ds = p * (dp - delta_tile[:, None])
    dk_acc += dot(tl.trans(round_to(ds, q_tile.dtype)), q_tile, PRECISION)
    return dk_acc, dv_acc
