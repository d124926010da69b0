"""Which tiles of the score matrix a program visits, and which pairs of a tile are visible, from the mask's normal form.

A tile is empty (skipped), full (no pair hidden: computed without a mask) or partial. Both directions of the loop are here: over
keys for a block of queries, and over queries for a block of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_ranges(key_begin, key_end, query_end, b, M, N):
    """The sequence's live keys [begin, end) and live queries [0, rows)."""
    begin, end, rows = 0, N, M
    if key_begin is not None:
        begin = tl.maximum(tl.load(key_begin + b), 0)
    if key_end is not None:
        end = tl.minimum(tl.load(key_end + b), N)
    if query_end is not None:
        rows = tl.minimum(tl.load(query_end + b), M)
    return begin, end, rows


@triton.jit
def key_tiles(begin, end, rows, m0, diagonal, keys, pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys for the queries m0 .. m0 + BLOCK_M - 1.

    Returns (first, partial, full_first, full): the partial tiles are first, first + BLOCK_N, ... without the `full` tiles from
    full_first on; `partial` and `full` count tiles.
    """
    last = end
    full_last = end
    if diagonal is not None:
        last = tl.minimum(last, tl.minimum(m0 + BLOCK_M, rows) + diagonal)  # one past what the last row sees
        full_last = tl.minimum(full_last, m0 + diagonal + 1)  # one past what the first row sees
    if m0 >= rows:
        last = 0
        full_last = 0
    first = begin // BLOCK_N * BLOCK_N
    full_first = tl.cdiv(begin, BLOCK_N) * BLOCK_N
    full = 0
    if keys is None and pairs is None:
        full = tl.maximum(tl.maximum(full_last, 0) // BLOCK_N - full_first // BLOCK_N, 0)
    partial = tl.cdiv(tl.maximum(last - first, 0), BLOCK_N) - full
    return first, partial, full_first, full


@triton.jit
def query_tiles(begin, end, rows, n0, diagonal, pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries for the keys n0 .. n0 + BLOCK_N - 1: (first, partial, full), the full ones after the partial ones.

    Full means that the band and `pairs` hide nothing; what hides a key from every query is no business of the loop.
    """
    first = 0
    partial = 0
    if diagonal is not None:
        first = tl.maximum(n0 - diagonal, 0) // BLOCK_M * BLOCK_M  # the first row that sees key n0
        full_first = tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - diagonal, 0), BLOCK_M) * BLOCK_M
        partial = (full_first - first) // BLOCK_M
    total = tl.cdiv(tl.maximum(rows - first, 0), BLOCK_M)
    if n0 >= end or n0 + BLOCK_N <= begin:
        total = 0
    if pairs is not None:
        partial = total
    partial = tl.minimum(partial, total)
    return first, partial, total - partial


@triton.jit
def live_keys(n, begin, end, keys, keys_row, keys_n):
    """Keys n (int32) that some query may see."""
    live = (n >= begin) & (n < end)
    if keys is not None:
        live &= tl.load(keys + keys_row + n.to(tl.int64) * keys_n, mask=live, other=0) != 0
    return live


@triton.jit
def visible_pairs(m, n, row_live, key_live, diagonal, pairs, pairs_head, pairs_m, pairs_n):
    """Visible pairs of queries m and keys n, (len(m), len(n)) bool."""
    visible = row_live[:, None] & key_live[None, :]
    if diagonal is not None:
        visible &= n[None, :] - m[:, None] <= diagonal
    if pairs is not None:
        offsets = m.to(tl.int64)[:, None] * pairs_m + n.to(tl.int64)[None, :] * pairs_n
        visible &= tl.load(pairs + pairs_head + offsets, mask=visible, other=0) != 0
    return visible
