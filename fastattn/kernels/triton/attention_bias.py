"""The gradient of a bias that keeps queries and keys, or of a table by distance: `_attention_dbias_kernel`, launched after dq.

A bias has dS = P * (K * dO V^T - delta), summed where it is broadcast, with P = exp(S - lse) recomputed and K what dropout keeps
over 1 - p. One program per kept sequence, kept head, tile of queries and keys, and split: it goes through its share of the pairs
(b, h) of what is reduced and holds its tile of the sum in registers. The number of splits follows from the request alone, each
has memory of its own and they are added once, so the result is deterministic. Where nothing is reduced the tile of dS is stored.

A table's gradient sums that tile once more, by the buckets of its distances j - i - a. Where a differs from sequence to sequence
this is done for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.triton.attention_backward import RUNTIME
from fastattn.kernels.triton.extras import bias_tile, kept_tile
from fastattn.kernels.triton.launch import GPU, Launch, ready
from fastattn.kernels.triton.primitives import LOG2_E, dot, round_to, rows_of
from fastattn.kernels.triton.tiles import (
    LISTED,
    key_interval,
    list_row,
    live_keys,
    live_queries,
    mask_bounds,
    sequence,
    visible_pairs,
)
from fastattn.kernels.triton.tuned import Config
from fastattn.lowering import Extras, LoweredMask, Prepared, packed_rows

PROGRAMS = 264  # two for each multiprocessor of an H100: where there would be fewer, what is reduced is split
DBIAS_RUNTIME = ["batches", "heads", "reduced_heads", "reduced", "share", "num_buckets"]


@triton.jit(do_not_specialize=[*RUNTIME, *DBIAS_RUNTIME])
def _attention_dbias_kernel(
    q, k, v, dout, lse, delta, dbias,
    prefix, key_begin, key_end, query_end, keys, ids, key_ids, bits, query_starts, key_starts, tiles,
    bias, table, buckets, slopes, kept,
    total_queries, total_keys, M, N, batches, heads, reduced_heads, reduced, share,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, dout_b, dout_h, dout_l,
    low, high, prefix_high,
    keys_b, keys_n, ids_b, ids_m, key_ids_b, key_ids_n, bits_b, bits_h, bits_m, bits_n, tiles_b, tiles_h, tiles_t,
    bias_b, bias_h, bias_m, bias_n, bias_keys, reach, slopes_b, slopes_h, kept_words, kept_scale,
    scale, H, group, num_buckets,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias: (splits, batches, heads, M, N), or of a table (splits and tiles, num_buckets, H). Of the `reduced` pairs (b, h),
    reduced_heads for each b, a split has `share`."""
    PER_SEQUENCE: tl.constexpr = table is not None and query_starts is not None and BOTTOM_RIGHT
    across = tl.cdiv(N, BLOCK_N)
    tiles_of_head = tl.cdiv(M, BLOCK_M) * across
    place = tl.program_id(0) // tiles_of_head
    tile = tl.program_id(0) % tiles_of_head
    head, batch, split = (place % heads).to(tl.int64), (place // heads % batches).to(tl.int64), place // heads // batches
    block, n0 = tile // across, tile % across * BLOCK_N
    m, n = block * BLOCK_M + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    q_l, k_l, v_l, dout_l = q_l * VECTOR, k_l * VECTOR, v_l * VECTOR, dout_l * VECTOR
    a = N - M if BOTTOM_RIGHT else 0
    extras = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a
    if not PER_SEQUENCE:  # what is reduced has one bias
        bias_of_tile = bias_tile(m, n, m < M, batch, head, H, extras, BIAS_UNIT)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BUCKETS], tl.float32)
    first_pair = split * share
    last_pair = tl.minimum(first_pair + share, reduced)
    if low is not None and prefix is None:  # what the band hides is hidden in all sequences
        left = mask_bounds(low, high, None, None, None, None, None, 0, M, N)
        band = low, high, None, left[0], left[1], left[2], left[3], left[4]
        last_pair = tl.where(_meets(block * BLOCK_M, n0, band, BLOCK_M, BLOCK_N), last_pair, first_pair)
    for pair in range(first_pair, last_pair):
        b, h = batch + pair // reduced_heads, head + pair % reduced_heads
        queries, count, row = M, N, (b * H + h) * M  # row: of lse and delta
        q_head = q + b * q_b * VECTOR + h * q_h * VECTOR
        k_head = k + b * k_b * VECTOR + h // group * k_h * VECTOR
        v_head = v + b * v_b * VECTOR + h // group * v_h * VECTOR
        dout_head = dout + b * dout_b * VECTOR + h * dout_h * VECTOR
        if query_starts is not None:
            q_begin, queries = sequence(query_starts, b, total_queries, M)
            k_begin, count = sequence(key_starts, b, total_keys, N)
            row = h * total_queries + q_begin
            q_head, dout_head = q_head + q_begin * q_l, dout_head + q_begin * dout_l
            k_head, v_head = k_head + k_begin * k_l, v_head + k_begin * v_l
        ends = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, queries, count)
        bounds = low, high, prefix_high, ends[0], ends[1], ends[2], ends[3], ends[4]
        visited = _meets(block * BLOCK_M, n0, bounds, BLOCK_M, BLOCK_N)
        if tiles is not None:
            listed = list_row(b, h, block, tiles_b, tiles_h, tiles_t, BLOCK_M)
            visited = visited & _lists(tiles + listed, n0 // LISTED)
        # a branch would keep the loop from fetching ahead: it pays where a list says that most tiles are hidden
        if tiles is None or visited:
            terms = (b, keys, keys_b, keys_n, ids, ids_b, ids_m, key_ids, key_ids_b, key_ids_n,
                     bits, bits_b, bits_h, bits_m, bits_n)  # fmt: skip
            row_live, row_id = live_queries(m, bounds, terms)
            key_live, key_id = live_keys(n, bounds, terms)
            row_live, key_live = row_live & visited, key_live & visited
            lse_tile = tl.load(lse + row + m, mask=row_live, other=float("-inf"))
            row_live &= lse_tile > float("-inf")
            shift = tl.where(row_live, lse_tile * LOG2_E, float("inf"))
            q_tile = rows_of(q_head, m, q_l, row_live, D, BLOCK_D)
            k_tile = rows_of(k_head, n, k_l, key_live, D, BLOCK_D)
            if PER_SEQUENCE:
                own_a = count - queries
                own = bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, own_a
                bias_of_tile = bias_tile(m, n, row_live, b, h, H, own, BIAS_UNIT)
            s = dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E) + bias_of_tile
            do_tile = rows_of(dout_head, m, dout_l, row_live, DV, BLOCK_DV)
            dp = dot(do_tile, tl.trans(rows_of(v_head, n, v_l, key_live, DV, BLOCK_DV)), PRECISION)
            if kept is not None:
                dp = tl.where(kept_tile(m, n0, row_live, row, kept, kept_words, BLOCK_N), dp * kept_scale, 0.0)
            delta_tile = tl.load(delta + row + m, mask=row_live, other=0.0)
            visible = visible_pairs(m, n0, row_live, row_id, key_live, key_id, h, bounds, terms, BLOCK_N) & row_live[:, None]
            ds = tl.where(visible, tl.exp2(s - shift[:, None]) * (dp - delta_tile[:, None]), 0.0)
            if PER_SEQUENCE:
                sums += _bucket_sums(ds, m, n, own_a, buckets, reach, BUCKETS)
            else:
                acc += ds
    if table is None:
        base = dbias + place.to(tl.int64) * M * N
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(base + m.to(tl.int64)[:, None] * N + n[None, :], round_to(acc, dbias.dtype.element_ty), mask=inside)
    else:
        if not PER_SEQUENCE:
            sums = _bucket_sums(acc, m, n, a, buckets, reach, BUCKETS)
        x = tl.arange(0, BUCKETS)
        base = dbias + (split * tiles_of_head + tile).to(tl.int64) * num_buckets * H + head
        tl.store(base + x * H, round_to(sums, dbias.dtype.element_ty), mask=x < num_buckets)


@triton.jit
def _meets(m0, n0, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the bounds leave a pair of the tile at query m0 and key n0."""
    _, _, _, _, _, _, first, rows = bounds
    last = tl.minimum(m0 + BLOCK_M, rows) - 1
    m0 = tl.maximum(m0, first)
    begin, _ = key_interval(m0, bounds)
    _, end = key_interval(last, bounds)
    return (m0 <= last) & (begin < n0 + BLOCK_N) & (end > n0)


@triton.jit
def _lists(tiles, tile):
    """Whether the host's list at `tiles` names that tile."""
    STEP: tl.constexpr = 32
    count = tl.load(tiles) + tl.load(tiles + 1)
    found = 0
    for first in range(0, count, STEP):
        t = first + tl.arange(0, STEP)
        found += tl.sum((tl.load(tiles + 2 + t, mask=t < count, other=-1) == tile).to(tl.int32))
    return found > 0


@triton.jit
def _bucket_sums(ds, m, n, a, buckets, reach, BUCKETS: tl.constexpr):
    """The sums of a tile over the pairs of each bucket, (BUCKETS,) in fp32: of those between the least and the greatest in it."""
    distance = n[None, :] - m[:, None] - a
    bucket = tl.load(buckets + tl.minimum(tl.maximum(distance, -reach), reach) + reach)
    x = tl.arange(0, BUCKETS)
    sums = tl.zeros([BUCKETS], tl.float32)
    for some in range(tl.min(bucket), tl.max(bucket) + 1):
        sums = tl.where(x == some, tl.sum(tl.where(bucket == some, ds, 0.0)), sums)
    return sums


# Launching


class Shares(NamedTuple):
    """How a sum over pairs (b, h) is shared out: the sequences and heads of the result, the pairs that are reduced for each, so
    many heads of them for each sequence, and the pairs of one split."""

    batches: int
    heads: int
    reduced_heads: int
    reduced: int
    share: int


def bias_config(gpu: GPU, dtype: torch.dtype, block_d: int) -> Config:
    """block_d: columns of the wider tile. An IEEE fp32 tl.dot takes small tiles, as in the other kernels, and so does mma.sync,
    which holds operands in registers. What is not sm_90's fits 99 KB of shared memory."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 1) if block_d <= 64 else Config(16, 16, 8, 1)
    if 90 <= gpu.sm < 120:
        return Config(64, 64, 8, 2)
    return Config(64, 32, 8, 2) if block_d <= 64 else Config(32, 16, 4, 1)


def bias_launch(arguments: dict[str, Any], lse: Tensor, delta: Tensor, extras: Extras, gpu: GPU) -> Launch:
    """The gradient of extras' bias, which keeps queries and keys, or of its table.

    arguments: those that all attention kernels take, of q, k, v, dout, the mask with its tiles of keys, and extras. lse and delta
    are (B, H, M) or (H, T), in fp32.
    """
    config = bias_config(gpu, arguments["q"].dtype, max(arguments["BLOCK_D"], arguments["BLOCK_DV"]))
    given, starts, (M, N, H) = _given(extras), arguments["query_starts"], (arguments[name] for name in ("M", "N", "H"))
    B = arguments["q"].shape[0] if starts is None else starts.shape[0] - 1
    shares, partials, programs = _shares(extras, B, H, M, N, config)
    # another call of packed sequences may have more than one result of an element, unless nothing can be reduced
    alone = extras.bias is not None and given.shape[0] > 1 and given.shape[1] == H
    rounded = partials == 1 and (starts is None or alone)
    memory = _memory(given.to("meta"), partials, given.dtype if rounded else torch.float32)
    buckets = None if extras.table is None else given.shape[0]
    own = {"lse": lse, "delta": delta, "dbias": memory, "num_buckets": buckets, "BUCKETS": triton.next_power_of_2(buckets or 1)}
    return Launch(_attention_dbias_kernel, programs, {**arguments, **own, **shares._asdict()}, config)


def bias_launcher(launch: Launch) -> Callable[..., Tensor]:
    """`go(tensors, masked, added, mask, extras)`, of packed sequences with `total_queries, total_keys` behind, which gives the
    gradient in the shape and dtype of what it is of.

    tensors: handles of q, k, v, dout, lse and delta; masked: those of the mask and its tiles of keys; added: those of extras.
    """
    start, handle, values = ready(launch)
    H, config, names = launch.arguments["H"], launch.config, launch.kernel.arg_names
    first, behind = names.index("total_queries"), names.index("share") + 1
    numbers, constants, programs = values[first:behind], values[behind:], launch.programs
    dtype, results = launch.arguments["dbias"].dtype, launch.arguments["dbias"].shape[0]

    def dense(tensors: tuple, masked: tuple, added: tuple, mask: LoweredMask, extras: Extras) -> Tensor:
        memory = _memory(_given(extras), results, dtype)
        if programs:
            start(programs, (*tensors, handle(memory), *masked, *added, *numbers, *constants))
        return _sum(memory, _given(extras))

    def packed(
        tensors: tuple, masked: tuple, added: tuple, mask: LoweredMask, extras: Extras, total_queries: int, total_keys: int
    ) -> Tensor:
        assert mask.query_starts is not None and mask.max_queries is not None and mask.max_keys is not None
        M, N = mask.max_queries, mask.max_keys
        shares, partials, programs = _shares(extras, mask.query_starts.shape[0] - 1, H, M, N, config)
        memory = _memory(_given(extras), partials, dtype)
        if programs:
            sizes = total_queries, total_keys, M, N, *shares
            start(programs, (*tensors, handle(memory), *masked, *added, *sizes, *constants))
        return _sum(memory, _given(extras))

    return dense if launch.arguments["query_starts"] is None else packed


def _shares(extras: Extras, B: int, H: int, M: int, N: int, config: Config) -> tuple[Shares, int, int]:
    """For B sequences; and how many partial results and how many programs there are."""
    batches, heads = (1, H) if extras.bias is None else extras.bias.shape[:2]
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    reduced_heads = H // max(heads, 1)
    reduced = B // max(batches, 1) * reduced_heads
    wanted = max(min(triton.cdiv(PROGRAMS, max(batches * heads * tiles, 1)), reduced), 1)
    share = triton.cdiv(reduced, wanted)
    splits = triton.cdiv(reduced, max(share, 1)) or 1
    partials = splits if extras.table is None else splits * tiles
    return Shares(batches, heads, reduced_heads, reduced, share), partials, splits * batches * heads * tiles


def _given(extras: Extras) -> Tensor:
    """What the gradient is of."""
    given = extras.table if extras.bias is None else extras.bias
    assert given is not None
    return given


def _memory(given: Tensor, partials: int, dtype: torch.dtype) -> Tensor:
    """What the kernel writes: the gradient itself, or partial results in fp32."""
    return given.new_empty((partials, *given.shape), dtype=dtype)


def _sum(memory: Tensor, given: Tensor) -> Tensor:
    return (memory[0] if memory.shape[0] == 1 else memory.sum(0)).to(given.dtype)


def reduced_by(extras: Extras) -> str | None:
    """Over which dimension of the scores the gradient of a bias is a sum: of "keys" it is the gradient of the log-sum-exp, which
    needs no kernel, of "queries" the kernel of dK and dV makes it. None: of neither."""
    if extras.bias is None:
        return None
    return "keys" if extras.bias.shape[3] == 1 else "queries" if extras.bias.shape[2] == 1 else None


def make_columns(q: Tensor, k: Tensor, mask: Prepared) -> Tensor:
    """Memory for the sums of dS over the queries, (B, H, N)."""
    if not mask.packed:
        return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    sequences, H = mask.fields.query_starts.shape[0] - 1, q.shape[-3 if q.dim() == 4 else 1]
    return q.new_zeros((sequences, H, mask.fields.max_keys), dtype=torch.float32)


def bias_sums(columns: Tensor | None, dlse: Tensor | None, lse: Tensor, mask: Prepared, bias: Tensor) -> Tensor:
    """The gradient of a bias from `columns`, or of a bias for all keys from that of the log-sum-exp."""
    if columns is not None:
        return columns[:, :, None].sum_to_size(bias.shape).to(bias.dtype)
    if dlse is None:
        return bias.new_zeros(bias.shape)
    live = torch.where(lse == float("-inf"), 0, dlse)
    if mask.packed:
        row = packed_rows(mask.fields.query_starts, mask.fields.max_queries, lse.shape[-1])
        live = torch.nn.functional.pad(live.flatten(0, -2), (0, 1))[:, row].transpose(0, 1)
    return live[..., None].sum_to_size(bias.shape).to(bias.dtype)
