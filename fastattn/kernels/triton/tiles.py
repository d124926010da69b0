"""Which tiles of the score matrix a program visits, and which pairs of a tile are visible, from the mask's normal form.

A tile is empty (skipped), full (no pair hidden: computed without a mask) or partial. The bounds leave each query one interval of
keys, and each key one of queries, with ends that never move back, so the tiles to visit are one run of them and the full ones a
run inside it; where a mask has more than bounds, the host lists the tiles. Both directions of the loop are here: over keys for a
block of queries, and over queries for a block of keys.

Two tuples of what a kernel is given go through all of it. Any of their pointers, and of their bounds on j - i, may be None, and
Triton before 3.7 takes no None back from a function, so the kernels put them together:
- `bounds`: low, high, prefix_high, and the five numbers of `mask_bounds`;
- `terms`: the sequence b, then keys, ids, key_ids and bits, each followed by its strides.
Of packed sequences, M and N are those of the program's own sequence, and all places count from 0 in it.
All scalars of bounds are int32: `unsupported` refuses lengths that would overflow, and the host clamps low, high and prefix_high
accordingly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.lowering import TILE

LISTED = tl.constexpr(TILE)  # queries and keys of a listed tile


@triton.jit
def sequence(starts, b, total, longest):
    """The first row, int64, of packed sequence b, and how many rows it has, at most `longest`.

    Whatever `starts` holds, they are among the `total` rows that there are.
    """
    begin = tl.minimum(tl.maximum(tl.load(starts + b), 0), total)
    end = tl.maximum(tl.minimum(tl.load(starts + b + 1), total), begin)
    return begin.to(tl.int64), tl.minimum(end - begin, longest).to(tl.int32)


@triton.jit
def mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N):
    """(prefix_end, begin, end, first, rows): the prefix of sequence b, and the least keys [begin, end) and queries [first, rows)
    around what its bounds leave.

    Each query of [first, rows) sees a key, each key of [begin, end) is seen by a query, as far as bounds go. If they leave
    nothing, rows and end are 0. `low` is None where there are no bounds on j - i, else low and high are numbers.
    """
    begin, end, first, rows, prefix_end = 0, N, 0, M, 0
    if key_begin is not None:
        begin = tl.minimum(tl.maximum(tl.load(key_begin + b), 0), N)
    if key_end is not None:
        end = tl.minimum(tl.load(key_end + b), N)
    if query_end is not None:
        rows = tl.minimum(tl.load(query_end + b), M)
    if low is not None:
        if prefix is not None:
            prefix_end = tl.minimum(tl.maximum(tl.load(prefix + b), 0), N)
            end = tl.where(low > prefix_high, tl.minimum(end, prefix_end), end)  # the prefix alone is left
        end = tl.where(low > high, 0, end)
        ends = low, high, prefix_high, prefix_end, begin, end, first, rows
        first, _ = query_interval(begin, ends)
        _, rows = query_interval(end - 1, ends)
    rows = tl.where(end > begin, rows, 0)
    end = tl.where(rows > first, end, 0)
    if low is not None:
        ends = low, high, prefix_high, prefix_end, begin, end, first, rows
        begin, _ = key_interval(first, ends)
        _, end = key_interval(rows - 1, ends)
        end = tl.where(rows > first, end, 0)
    return prefix_end, begin, end, first, rows


@triton.jit
def key_interval(i, bounds):
    """The keys [first, last) that the bounds leave query i, a scalar or a block; first >= last if none."""
    low, high, prefix_high, prefix_end, first, last, _, _ = bounds
    if low is not None:
        first = tl.maximum(first, i + low)
        last = tl.minimum(last, i + high + 1)
        if prefix_high is not None:
            last = tl.minimum(last, tl.maximum(prefix_end, i + prefix_high + 1))
    return first, last


@triton.jit
def query_interval(j, bounds):
    """The queries [first, last) that see key j, a scalar or a block; first >= last if none."""
    low, high, prefix_high, prefix_end, _, _, first, last = bounds
    if low is not None:
        if prefix_high is not None:  # the nearer bound first: in max(0, -high, x, y) ptxas 12.8 loses the sign
            high = tl.where(j < prefix_end, high, tl.minimum(high, prefix_high))
        first = tl.maximum(first, j - high)
        last = tl.minimum(last, j - low + 1)
    return first, last


@triton.jit
def key_run(m0, bounds, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys for the queries m0 .. m0 + BLOCK_M - 1: (start, before, full, partial).

    The run starts at key `start`; after `before` partial tiles come `full` full ones; `partial` counts the partial ones on both
    sides. `keys` may have holes anywhere: with it none is full.
    """
    _, _, _, _, _, _, first, rows = bounds
    m1 = tl.minimum(m0 + BLOCK_M, rows) - 1
    m0 = tl.maximum(m0, first)
    visible_first, full_last = key_interval(m0, bounds)
    full_first, visible_last = key_interval(m1, bounds)
    start = visible_first // BLOCK_N
    total = tl.where(m0 <= m1, tl.cdiv(visible_last, BLOCK_N) - start, 0)
    full = 0
    if keys is None:
        full = tl.where(m0 <= m1, tl.maximum(full_last // BLOCK_N - tl.cdiv(full_first, BLOCK_N), 0), 0)
    return start * BLOCK_N, tl.cdiv(full_first, BLOCK_N) - start, full, total - full


@triton.jit
def query_run(n0, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries for the keys n0 .. n0 + BLOCK_N - 1, as `key_run` gives those of keys.

    Full means that no live query is hidden from a live key: a key that is not live gathers what is not stored, and a query that
    is not live is read as 0 and has weight 0.
    """
    _, _, _, _, begin, end, first, rows = bounds
    n1 = tl.minimum(n0 + BLOCK_N, end) - 1
    n0 = tl.maximum(n0, begin)
    visible_first, full_last = query_interval(n0, bounds)
    full_first, visible_last = query_interval(n1, bounds)
    start = visible_first // BLOCK_M
    full_start = tl.where(full_first <= first, full_first // BLOCK_M, tl.cdiv(full_first, BLOCK_M))
    full_end = tl.where(full_last >= rows, tl.cdiv(full_last, BLOCK_M), full_last // BLOCK_M)
    total = tl.where(n0 <= n1, tl.cdiv(visible_last, BLOCK_M) - start, 0)
    full = tl.where(n0 <= n1, tl.maximum(full_end - full_start, 0), 0)
    return start * BLOCK_M, full_start - start, full, total - full


@triton.jit
def listed_run(tiles, length, BLOCK: tl.constexpr, CUT: tl.constexpr = False):
    """The same four numbers for a row of the host's lists: `before` counts its partial tiles, and there is no start.

    A listed tile is walked in steps of BLOCK. The last full one may reach beyond `length`, so it is visited as a partial one.
    CUT says that it may lie beyond altogether, as it does where a packed tensor has fewer rows than its offsets say: then none
    is taken for full.
    """
    partial, full = tl.load(tiles), tl.load(tiles + 1)
    last = tl.load(tiles + 1 + partial + full, mask=full > 0, other=-1)
    ragged = tl.where((last + 1) * LISTED > length, 1, 0)
    if CUT:
        ragged = tl.where(last * LISTED >= length, full, ragged)
    STEPS: tl.constexpr = LISTED // BLOCK
    return 0, partial * STEPS, (full - ragged) * STEPS, (partial + ragged) * STEPS


@triton.jit
def tile_start(place, start, tiles, row, BLOCK: tl.constexpr):
    """The first key or query of the tile at `place`, counted over partial and full tiles of a run or, with `tiles`, of the host's
    list at `row`."""
    if tiles is None:
        return start + place * BLOCK
    else:
        STEPS: tl.constexpr = LISTED // BLOCK
        return tl.load(tiles + row + 2 + place // STEPS) * LISTED + place % STEPS * BLOCK


@triton.jit
def partial_place(t, before, full):
    """The place of the t-th partial tile: the full ones lie together after `before` partial ones."""
    return t + tl.where(t >= before, full, 0)


@triton.jit
def list_row(b, h, block, tiles_b, tiles_h, tiles_t, BLOCK: tl.constexpr):
    """Where in the host's lists that of block number `block` of head h is."""
    return b * tiles_b + h * tiles_h + (block * BLOCK // LISTED).to(tl.int64) * tiles_t


@triton.jit
def live_queries(m, bounds, terms):
    """Queries m that the bounds leave a key, and their ids (0 where the mask has none)."""
    b, _, _, _, ids, ids_b, ids_m, _, _, _, _, _, _, _, _ = terms
    _, _, _, _, _, _, first, rows = bounds
    live = (m >= first) & (m < rows)
    id = 0
    if ids is not None:
        id = tl.load(ids + b * ids_b + m.to(tl.int64) * ids_m, mask=live, other=-1)
    return live, id


@triton.jit
def live_keys(n, bounds, terms):
    """Keys n that some query may see, and their ids."""
    b, keys, keys_b, keys_n, _, _, _, key_ids, key_ids_b, key_ids_n, _, _, _, _, _ = terms
    _, _, _, _, begin, end, _, _ = bounds
    live = (n >= begin) & (n < end)
    if keys is not None:
        live &= tl.load(keys + b * keys_b + n.to(tl.int64) * keys_n, mask=live, other=0) != 0
    id = 0
    if key_ids is not None:
        id = tl.load(key_ids + b * key_ids_b + n.to(tl.int64) * key_ids_n, mask=live, other=-1)
        live &= id >= 0
    return live, id


@triton.jit
def visible_pairs(m, n0, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N: tl.constexpr):
    """Pairs that head h sees, (len(m) or 1, BLOCK_N) bool, of queries m and keys n0 .. n0 + BLOCK_N - 1.

    Of a row that is not live it may say anything.
    """
    b, _, _, _, ids, _, _, _, _, _, bits, bits_b, bits_h, bits_m, bits_n = terms
    n = n0 + tl.arange(0, BLOCK_N)
    visible = key_live[None, :]
    if bounds[0] is not None:
        first, last = key_interval(m, bounds)
        visible = visible & (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
    if ids is not None:
        visible = visible & (row_id[:, None] == key_id[None, :])
    if bits is not None:  # a word for 32 keys is loaded once and spread
        WORDS: tl.constexpr = max(BLOCK_N // 32, 1)
        WIDTH: tl.constexpr = min(BLOCK_N, 32)
        word = n0 // 32 + tl.arange(0, WORDS)
        inside = row_live[:, None] & (word * 32 < bounds[5])[None, :]
        bits += b * bits_b + h * bits_h
        words = tl.load(bits + m.to(tl.int64)[:, None] * bits_m + word.to(tl.int64)[None, :] * bits_n, mask=inside, other=0)
        spread = (words[:, :, None] >> (n0 % 32 + tl.arange(0, WIDTH))[None, None, :]) & 1
        visible = visible & (tl.reshape(spread, [m.shape[0], BLOCK_N]) != 0)
    return visible
