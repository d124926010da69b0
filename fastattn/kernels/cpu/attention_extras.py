"""Bias and dropout on a CPU: softmax and products in plain PyTorch, a block of scores at a time.

PyTorch's flash-attention kernel for CPUs has neither dropout nor a gradient of what is added to scores. Here each sequence is
computed on its own queries and keys, some heads at a time, so that the scores of a block stay in a core's caches; threads that
compute serially share these pieces. Of a forward only out and lse are kept: P = exp(S - lse) comes again in the backward.

Two operations are left out because PyTorch takes ten times as long for them as for others of one pass: `masked_fill` and `where`
of whole blocks. Hidden pairs have -inf added to their scores, and dropout multiplies by 0 or 1 / (1 - p).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastattn.dropout import rescale
from fastattn.kernels.cpu import shared_out
from fastattn.kernels.cpu.attention_packed import Run, runs
from fastattn.kernels.cpu.attention_parts import each_sequence, of_batch
from fastattn.lowering import LEAST_SCORE, Extras, LoweredMask
from fastattn.reference import compute_dtype

INF = float("inf")
# Scores of a block: with P, the gradients and what dropout keeps 2 to 8 MB in fp32. Large ones multiply faster, by up to a half
# where sequences are long; smaller ones are made where there would be fewer than two for each thread.
LEAST_PAIRS, PAIRS = 2**17, 2**19
SHARED = 2**21  # multiply-adds of q k^T from which threads are woken
SPLITS = 4  # pieces of a sequence's heads, or sums, in which the gradient of a bias is made
ROWS = 64  # queries of a block where a mask leaves each other keys, and the least of any


class Piece(NamedTuple):
    """Some heads of neighbouring sequences that have one number of queries and one interval of keys."""

    run: Run | None  # where packed sequences lie
    batch: slice  # among all sequences, or the run's
    number: int  # of the first one, among all
    heads: slice  # of k and v
    query_heads: slice
    rows: int  # queries, from the first on
    begin: int  # keys
    end: int
    a: int  # N - M
    mask: LoweredMask  # what else hides pairs, of these sequences and heads

    @property
    def count(self) -> int:
        return self.batch.stop - self.batch.start

    @property
    def pairs(self) -> int:
        return self.count * (self.query_heads.stop - self.query_heads.start) * self.rows * (self.end - self.begin)

    @property
    def bounded(self) -> bool:
        """Whether some queries see other keys than others do."""
        return any(x is not None for x in (self.mask.low, self.mask.high, self.mask.prefix, self.mask.ids, self.mask.bits))

    def queries(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """(sequences, query heads, rows, ...) of (B, H, M, ...), or packed (1, H, T, ...): a view."""
        x = x if self.run is None else self.run.queries(x)
        return x[self.batch, self.query_heads, slice(0, self.rows) if rows is None else rows]

    def keys(self, x: Tensor) -> Tensor:
        x = x if self.run is None else self.run.keys(x)
        return x[self.batch, self.heads, self.begin : self.end]

    def of_pairs(self, x: Tensor, rows: slice, keys: slice) -> Tensor:
        """The part of a tensor that broadcasts to (all sequences, H, M, N): a view."""
        places = slice(self.number, self.number + self.count), self.query_heads, rows, keys
        return x[tuple(place if size > 1 else slice(None) for place, size in zip(places, x.shape, strict=True))]

    def of_sequences(self, x: Tensor) -> Tensor:
        return x[self.number : self.number + self.count] if x.shape[0] > 1 else x

    def distances(self, rows: slice, keys: slice, bottom_right: bool) -> Tensor:
        """j - i - a from the least to the greatest in a block, (rows + keys - 1,)."""
        a = self.a if bottom_right else 0
        return torch.arange(keys.start - rows.stop + 1 - a, keys.stop - rows.start - a)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Queries, the keys that one of them may see, and which they see, bool (sequences or 1, heads or 1, rows, keys), or None
        where all see all."""
        mask, bounded = self.mask, self.bounded
        step = ROWS if bounded else max(ROWS, PAIRS * self.rows // max(1, self.pairs))
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            begin, end = self._seen(rows)
            if begin >= end:
                continue
            if not bounded and mask.keys is None:
                yield rows, slice(begin, end), None
                continue
            visible = mask.pairs(torch.arange(rows.start, rows.stop), torch.arange(begin, end))
            if mask.ids is not None or mask.bits is not None:
                some = visible.flatten(0, 2).any(0).nonzero()
                if not len(some):
                    continue
                low, high = int(some[0]), int(some[-1]) + 1
                visible, begin, end = visible[..., low:high], begin + low, begin + high
            yield rows, slice(begin, end), None if visible.all() else visible

    def _seen(self, rows: slice) -> tuple[int, int]:
        """The keys that the bounds on j - i leave to any of some queries."""
        mask, last = self.mask, rows.stop - 1
        begin = self.begin if mask.low is None else max(self.begin, rows.start + mask.low)
        end = self.end if mask.high is None else min(self.end, last + mask.high + 1)
        if mask.prefix is not None and mask.prefix_high is not None:
            end = min(end, max(int(mask.prefix.max()), last + mask.prefix_high + 1))
        return begin, end


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, extras: Extras) -> tuple[Tensor, Tensor]:
    B, H, M, _ = q.shape
    out = q.new_zeros(B, M, H, v.shape[3]).transpose(1, 2)
    lse = q.new_full((B, H, M, 1), -INF, dtype=compute_dtype(q.dtype))
    extras = _as_heads(extras)

    def compute(group: tuple[list[Piece], None]) -> None:
        for piece in group[0]:
            keys, values = (_loaded_keys(piece, x) for x in (k, v))
            for rows, some, visible in piece.blocks():
                shown = slice(some.start - piece.begin, some.stop - piece.begin)
                queries = _loaded_queries(piece.queries(q, rows), piece, _dead(visible))
                p = _scores(piece, rows, some, visible, queries, keys[:, shown], scale, extras)
                _put(piece.queries(out, rows), piece.queries(lse, rows), p, _kept(piece, rows, some, extras, p), values[:, shown])

    _each(compute, [([piece], None) for piece in _pieces(mask, extras, q, k)], q.shape[3])
    return out, lse[..., 0]


def backward(dout, dlse, q, k, v, lse, mask: LoweredMask, scale: float, extras: Extras, bias_grad: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv, and with `bias_grad` that of extras' bias or table."""
    grads = [x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]
    dbias = None
    if bias_grad:
        biased = extras.table if extras.bias is None else extras.bias
        shared = extras.bias is not None and extras.bias.shape[0] == extras.bias.shape[1] == 1
        dbias = torch.zeros(SPLITS if shared else 1, *biased.shape, dtype=compute_dtype(q.dtype))
    extras = _as_heads(extras)
    given = dout, None if dlse is None else dlse[..., None], q, lse[..., None]

    def compute(group: tuple[list[Piece], Tensor | None]) -> None:
        pieces, total = group
        for piece in pieces:
            found = _backward_piece(piece, given, k, v, scale, extras, grads[0], total)
            for x, value in zip(grads[1:], found, strict=True):
                to = piece.keys(x)
                to.copy_(value.view(to.shape))

    _each(compute, _apart(_pieces(mask, extras, q, k, dbias), extras, dbias), q.shape[3])
    return tuple(grads) if dbias is None else (*grads, dbias.sum(0).to(biased.dtype))


def _put(out: Tensor, lse: Tensor, p: Tensor, kept: Tensor | None, values: Tensor) -> None:
    """The results of a block from its scores; a row that sees nothing has lse -inf and out 0."""
    top = p.amax(-1, keepdim=True)
    top = torch.where(top < LEAST_SCORE, INF, top)
    total = p.sub_(top).exp_().sum(-1, keepdim=True)
    dead = total == 0
    lse.copy_(torch.where(dead, -INF, top + total.log()).view(lse.shape))
    weights = p if kept is None else p.mul_(kept)
    out.copy_(torch.bmm(weights, values).div_(torch.where(dead, 1, total)).view(out.shape))


def _backward_piece(piece: Piece, given: tuple, k, v, scale: float, extras: Extras, dq: Tensor, dbias: Tensor | None):
    """dK and dV, (sequences x heads, keys, D), see `reference.attention_backward`; dQ and the bias's go where they belong."""
    dout, dlse, q, lse = given
    keys, values = (_loaded_keys(piece, x) for x in (k, v))
    dk, dv = torch.zeros(keys.shape, dtype=keys.dtype), torch.zeros(values.shape, dtype=keys.dtype)
    for rows, some, visible in piece.blocks():
        shown = slice(some.start - piece.begin, some.stop - piece.begin)
        block_lse = piece.queries(lse, rows)
        dead = block_lse == -INF
        hidden = dead if dead.any() else None
        queries, do = (_loaded_queries(piece.queries(x, rows), piece, hidden) for x in (q, dout))
        p = _scores(piece, rows, some, visible, queries, keys[:, shown], scale, extras)
        p.sub_(torch.where(dead, INF, block_lse).reshape(*p.shape[:2], 1)).exp_()
        kept = _kept(piece, rows, some, extras, p)
        weights = p if kept is None else kept.mul_(p)
        dv[:, shown].baddbmm_(weights.mT, do)
        ds = torch.bmm(do, values[:, shown].mT).mul_(weights)
        delta = ds.sum(-1, keepdim=True)  # rowsum(dO * O), but of O before it is rounded
        if dlse is not None:
            delta -= torch.where(dead, 0, piece.queries(dlse, rows)).reshape(delta.shape)
        ds.addcmul_(p, delta, value=-1)
        if dbias is not None:
            _add_bias_gradient(dbias, piece, rows, some, ds, extras)
        dk[:, shown].baddbmm_(ds.mT, queries, alpha=scale)
        to = piece.queries(dq, rows)
        to.copy_(torch.bmm(ds, keys[:, shown]).mul_(scale).view(to.shape))
    return dk, dv


def _as_heads(extras: Extras) -> Extras:
    """With the kept bits of packed sequences, (H, T, W), as those of one: (1, H, T, W)."""
    if extras.kept is None or extras.kept.dim() == 4:
        return extras
    return extras._replace(kept=extras.kept[None])


def _loaded_keys(piece: Piece, x: Tensor) -> Tensor:
    """k or v as (sequences x heads, keys, D), with 0 for those that no query sees, which may hold NaN."""
    x = piece.keys(x)
    hidden, some = [], slice(piece.begin, piece.end)
    if piece.mask.keys is not None:
        hidden.append(~piece.mask.keys[:, None, some, None])
    if piece.mask.key_ids is not None:
        hidden.append(piece.mask.key_ids[:, None, some, None] < 0)
    for dead in hidden:
        x = x.masked_fill(dead, 0)
    return x.to(compute_dtype(x.dtype)).flatten(0, 1)


def _loaded_queries(x: Tensor, piece: Piece, dead: Tensor | None) -> Tensor:
    """(sequences, query heads, rows, D) as (sequences x heads of k, rows of all its query heads, D), with 0 for dead rows."""
    if dead is not None:
        x = x.masked_fill(dead, 0)
    n, heads, rows, D = x.shape
    group = heads // (piece.heads.stop - piece.heads.start)
    return x.to(compute_dtype(x.dtype)).reshape(n * heads // group, group * rows, D)


def _dead(visible: Tensor | None) -> Tensor | None:
    """bool (sequences or 1, heads or 1, rows, 1): the rows of a block that see nothing; None if all see something."""
    if visible is None:
        return None
    dead = ~visible.any(-1, keepdim=True)
    return dead if dead.any() else None


def _scores(
    piece: Piece, rows: slice, some: slice, visible: Tensor | None, queries, keys, scale: float, extras: Extras
) -> Tensor:
    """scale q k^T + bias, and -inf where a pair is hidden: (sequences x heads of k, rows of all its query heads, keys)."""
    s = torch.empty(queries.shape[0], queries.shape[1], keys.shape[1], dtype=queries.dtype)
    added = _bias(piece, rows, some, extras, s.dtype)
    if visible is not None:
        hides = 1 - visible.to(s.dtype).reciprocal()  # 0 or -inf
        added = hides if added is None else added + hides
    if added is None:
        return torch.baddbmm(s, queries, keys.mT, beta=0, alpha=scale, out=s)
    _by_pairs(s, piece, rows).copy_(added)
    return s.baddbmm_(queries, keys.mT, alpha=scale)


def _by_pairs(x: Tensor, piece: Piece, rows: slice) -> Tensor:
    """A view of a block's matrix as (sequences, query heads, rows, keys)."""
    heads = piece.query_heads.stop - piece.query_heads.start
    return x.view(piece.count, heads, rows.stop - rows.start, x.shape[-1])


def _bias(piece: Piece, rows: slice, some: slice, extras: Extras, dtype: torch.dtype) -> Tensor | None:
    """What is added to a block's scores: (sequences or 1, query heads or 1, rows or 1, keys or 1)."""
    if extras.bias is not None:
        return piece.of_pairs(extras.bias, rows, some).to(dtype)
    if extras.table is not None:
        values = extras.table[_buckets(piece, rows, some, extras), piece.query_heads].mT[None]
    elif extras.slopes is not None:
        slopes = piece.of_sequences(extras.slopes)[:, piece.query_heads, None]
        values = -slopes * piece.distances(rows, some, extras.bottom_right).abs()
    else:
        return None
    # by distance, (..., rows + keys - 1): from its end backwards each row begins one further on
    return values.to(dtype).unfold(-1, some.stop - some.start, 1).flip(-2)


def _buckets(piece: Piece, rows: slice, some: slice, extras: Extras) -> Tensor:
    """Of each distance."""
    assert extras.buckets is not None
    reach = extras.buckets.shape[0] // 2
    return extras.buckets[piece.distances(rows, some, extras.bottom_right).clamp(-reach, reach) + reach]


def _add_bias_gradient(dbias: Tensor, piece: Piece, rows: slice, some: slice, ds: Tensor, extras: Extras) -> None:
    ds = _by_pairs(ds, piece, rows)
    if extras.bias is not None:
        total = piece.of_pairs(dbias, rows, some)
        total += ds.sum_to_size(total.shape)
        return
    _, heads, M, N = ds.shape
    skewed = ds.new_zeros(heads, M, M + N)  # read as rows of M + N - 1, it has a column for each distance
    skewed[..., :N] = ds.sum(0).flip(-2)
    by_distance = skewed.flatten(1)[:, : M * (M + N - 1)].view(heads, M, M + N - 1).sum(1)
    dbias[:, piece.query_heads].index_add_(0, _buckets(piece, rows, some, extras), by_distance.mT)


def _kept(piece: Piece, rows: slice, some: slice, extras: Extras, p: Tensor) -> Tensor | None:
    """What dropout multiplies a block's weights by: 0, or 1 / (1 - p). None without dropout."""
    if extras.kept is None:
        return None
    first, last = some.start // 32, -(-some.stop // 32)
    octets = piece.queries(extras.kept, rows)[..., first:last].contiguous().numpy().view(np.uint8)
    factors = torch.from_numpy(_eight(extras.dropout, p.dtype).take(octets, 0)).flatten(-2)
    return factors[..., some.start - 32 * first : some.stop - 32 * first].view(p.shape)


@functools.lru_cache(maxsize=64)
def _eight(dropout: float, dtype: torch.dtype) -> np.ndarray:
    """(256, 8): the factors of the eight keys in a byte of bits."""
    with torch.inference_mode(False):
        return ((torch.arange(256)[:, None] >> torch.arange(8) & 1).to(dtype) * rescale(dropout)).numpy()


def _pieces(mask: LoweredMask, extras: Extras, q: Tensor, k: Tensor, dbias: Tensor | None = None) -> list[Piece]:
    """Those that have pairs; with the gradient of a bias that sequences share, all sequences are cut between the same heads."""
    H, Hkv = q.shape[1], k.shape[1]
    if not (H and q.shape[0]):
        return []
    group = H // Hkv
    spans = list(_spans(mask, extras, q, k))
    most_pairs = sum(span.pairs for span in spans) // (2 * torch.get_num_threads())
    shares = []
    for span in spans:
        keys = group * (span.end - span.begin)
        whole, block = keys * span.rows, keys * (min(span.rows, ROWS) if span.bounded else span.rows)  # of a head of k
        shares.append(max(1, min(PAIRS // block, max(most_pairs, LEAST_PAIRS) // whole)))
    most = Hkv if dbias is None else min([-(-Hkv // SPLITS), *shares])
    return [piece for span, share in zip(spans, shares, strict=True) for piece in _cut(span, share, min(share, most), group)]


def _cut(span: Piece, share: int, step: int, group: int) -> Iterator[Piece]:
    """Pieces of `share` heads of k and v, `step` of each sequence; `group` query heads have one of them."""
    count, heads, sequences = span.count, span.heads.stop, max(1, share // step)
    for b, h in itertools.product(range(0, count, sequences), range(0, heads, step)):
        batch, some = slice(b, min(b + sequences, count)), slice(h, min(h + step, heads))
        query_heads = slice(some.start * group, some.stop * group)
        mask = of_batch(span.mask, batch)
        if mask.bits is not None and mask.bits.shape[1] > 1:
            mask = mask._replace(bits=mask.bits[:, query_heads])
        place = slice(span.batch.start + batch.start, span.batch.start + batch.stop)
        yield span._replace(batch=place, number=span.number + b, heads=some, query_heads=query_heads, mask=mask)


def _spans(mask: LoweredMask, extras: Extras, q: Tensor, k: Tensor) -> Iterator[Piece]:
    """Pieces of all heads."""
    (B, H, M, _), (_, Hkv, N, _) = q.shape, k.shape
    by_sequence = any(x is not None and x.shape[0] > 1 for x in (extras.bias, extras.slopes))
    whole = [(None, 0, B, M, N, mask)]
    if mask.query_starts is not None:
        whole = [(run, run.number, run.count, run.M, run.N, run.mask) for run in runs(mask, M, N, by_sequence)]
    for run, number, count, M, N, own in whole:
        for batch, rows, keys in each_sequence(own, count, M, N):
            holes = not isinstance(keys, slice)
            begin, end = (int(keys[0]), int(keys[-1]) + 1) if holes else (keys.start, keys.stop)
            rest = own._replace(key_begin=None, key_end=None, query_end=None, keys=own.keys if holes else None)
            rest = of_batch(rest, batch)
            yield Piece(run, batch, number + batch.start, slice(0, Hkv), slice(0, H), rows, begin, end, N - M, rest)


def _apart(pieces: list[Piece], extras: Extras, dbias: Tensor | None) -> list[tuple[list[Piece], Tensor | None]]:
    """Groups, each in an order of its own, and what they add the gradient of a bias to: each to places of its own in dbias
    (1, ...), or where all have the same places, a fixed number of groups each to one of dbias (SPLITS, ...)."""
    if dbias is None:
        return [([piece], None) for piece in pieces]
    if dbias.shape[0] > 1:
        return [(pieces[n::SPLITS], total) for n, total in enumerate(dbias)]
    by_sequence = extras.bias is not None and extras.bias.shape[0] > 1
    by_heads = extras.bias is None or extras.bias.shape[1] > 1
    groups: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault((piece.number * by_sequence, piece.heads.start * by_heads), []).append(piece)
    return [(group, dbias[0]) for group in groups.values()]


def _each(compute: Callable[[Any], None], groups: list, D: int) -> None:
    """Shared out over threads, the longest first, where there is work for each and enough to wake them."""
    work = [sum(piece.pairs for piece in group[0]) for group in groups]
    if 1 < torch.get_num_threads() <= len(groups) and sum(work) * D > SHARED:
        order = sorted(range(len(groups)), key=work.__getitem__, reverse=True)
        shared_out.run(compute, [groups[n] for n in order])
        return
    for group in groups:
        compute(group)
