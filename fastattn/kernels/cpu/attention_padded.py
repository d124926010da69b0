"""Padding alone on a CPU: a call of PyTorch's kernel for all sequences, or several that leave the padding out.

A call of the kernel by several threads is a parallel region, and so is a copy of a large result. On idle cores a region costs
microseconds; where other processes want the cores, each waits milliseconds until all its threads have had their turn. So a single
call has one region, and one thread copies its results; several calls have none: threads that compute serially share them.

Hidden keys may hold NaN. Their weight is 0, and 0 * NaN is NaN, so it shows in the result, where few places tell: then the call
is made once more, with 0 for what is hidden. Without NaN, no one looks at all of k and v.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.cpu import shared_out
from fastattn.kernels.cpu.attention_atoms import GATHERED
from fastattn.lowering import LoweredMask

INF = float("inf")
# In multiply-adds of q k^T, on one core of an AMD EPYC, fp32:
CALL = 2**20  # what a call more must save: 0.06 ms for a call and its copies
SHARE = 2**22  # and what several must save beyond that: 0.25 ms; threads that are woken may find themselves on one core
CUT = 2**19  # what a smaller result must save
COPIED = 8  # and what each element of a result must that is copied
MASK = 2**20  # 0.06 ms for a mask, and the look for NaN
VECTOR, TAIL = 16, 3  # keys that the kernel takes at a time with AVX-512, and how much longer it takes for each of those left
SERIAL = 2**15  # elements from which PyTorch copies and fills with several threads
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Extents(NamedTuple):
    """Of each sequence; one that sees nothing has no queries, and keys from N up to 0."""

    rows: tuple[int, ...]
    begins: tuple[int, ...]  # the first visible key
    ends: tuple[int, ...]  # and one past the last
    lives: tuple[int, ...]  # visible keys

    def box(self, batch: slice) -> tuple[int, int, int]:
        """The queries, the first key and the end of the keys that some sequences have between them."""
        return max(self.rows[batch]), min(self.begins[batch]), max(self.ends[batch])

    def pairs(self, batch: slice) -> int:
        """What one call computes for them."""
        rows, begin, end = self.box(batch)
        return (batch.stop - batch.start) * rows * max(0, end - begin)


class Call(NamedTuple):
    """Neighbouring sequences that share a call, and what hides pairs in it."""

    batch: slice
    heads: slice
    rows: slice  # queries, from the first on
    keys: slice | Tensor  # an index where one sequence has many holes
    holes: bool = False  # whether some of the keys are hidden
    gathered: bool = False  # and those that are not are to be taken out
    hidden: Tensor | None = None  # bool (sequences, 1, 1, keys): keys that no query of their sequence sees; None for none
    lengths: list[int] | None = None  # how many queries of each sequence see something; None for all

    def whole(self, B: int, M: int, N: int) -> bool:
        """Whether it takes q, k and v as they are."""
        return isinstance(self.keys, slice) and (self.batch, self.rows, self.keys) == (slice(0, B), slice(0, M), slice(0, N))

    def hiding(self, hidden: Tensor) -> Call:
        """`hidden`: bool (B, 1, 1, N)."""
        hides = hidden[self.batch, :, :, self.keys]
        if not self.gathered:
            return self._replace(hidden=hides)
        assert isinstance(self.keys, slice)
        return self._replace(keys=(~hides[0, 0, 0]).nonzero()[:, 0] + self.keys.start)

    def pairs(self) -> int:
        keys = self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)
        return (self.batch.stop - self.batch.start) * self.rows.stop * keys

    def queries(self, x: Tensor) -> Tensor:
        """Its part of (B, H, M, ...)."""
        return x[self.batch, self.heads, self.rows]

    def taken(self, x: Tensor) -> Tensor:
        """Its part of k or v."""
        if isinstance(self.keys, slice):
            return x[self.batch, self.heads, self.keys]
        return x[self.batch, self.heads].transpose(1, 2).index_select(1, self.keys).transpose(1, 2)

    def dead(self) -> Tensor:
        """bool (sequences, 1, rows): queries that see nothing."""
        return torch.arange(self.rows.stop) >= torch.tensor(self.lengths)[:, None, None]

    def additive(self, q: Tensor) -> Tensor | None:
        """What is added to scores, 0 and -inf; the kernel wants the last two dimensions in full, without a copy."""
        if self.hidden is None:
            return None
        made = torch.zeros(self.hidden.shape, dtype=q.dtype).masked_fill_(self.hidden, -INF)
        return made.expand(-1, -1, q.shape[2], -1)


def serves(mask: LoweredMask) -> bool:
    """Whether nothing but padding, of queries or keys, hides pairs."""
    return mask.low is mask.high is mask.prefix is mask.ids is mask.bits is None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    """Of q, k and v that have one number of heads and one width, none of them empty, with scale > 0."""
    B, H, M, D = q.shape
    found = calls(mask, q, k.shape[2])
    if len(found) == 1 and found[0].rows.stop == M:
        (call,) = found
        out, lse = _forward(call, q, call.taken(k), call.taken(v), scale)
        if not out.transpose(1, 2).is_contiguous():  # heads inside, as it is wanted
            _place(inside := q.new_empty(B, M, H, D).transpose(1, 2), call.rows, out)
            out = inside
        return out, _filled(lse, call.lengths and call.dead(), -INF)
    out = q.new_empty(B, M, H, D).transpose(1, 2)
    lse = q.new_full((B, H, M), -INF, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)

    def compute(call: Call) -> None:
        to = out[call.batch, call.heads]
        if not call.rows.stop:
            to.zero_()
            return
        call_out, call_lse = _forward(call, call.queries(q), call.taken(k), call.taken(v), scale)
        _place(to, call.rows, call_out)
        call.queries(lse).copy_(call_lse)
        if call.lengths:
            call.queries(lse).masked_fill_(call.dead(), -INF)

    _each(compute, found, q)
    return out, lse


def backward(dout, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    B, H, M, D = q.shape
    N = k.shape[2]
    found = calls(mask, q, N, backward=True)
    if len(found) == 1 and found[0].whole(B, M, N):
        return _backward(found[0], dout, q, k, v, out, lse, scale)
    dq, dk, dv = (x.new_empty(B, x.shape[2], H, D).transpose(1, 2) for x in (q, k, v))

    def compute(call: Call) -> None:
        totals = [x[call.batch, call.heads] for x in (dq, dk, dv)]
        if not call.rows.stop:
            for total in totals:
                total.zero_()
            return
        call_dout, call_q, call_out, call_lse = (call.queries(x) for x in (dout, q, out, lse))
        grads = _backward(call, call_dout, call_q, call.taken(k), call.taken(v), call_out, call_lse, scale)
        for total, some, grad in zip(totals, (call.rows, call.keys, call.keys), grads, strict=True):
            _place(total, some, grad)

    _each(compute, found, q)
    return dq, dk, dv


def _each(compute: Callable[[Call], None], found: list[Call], q: Tensor) -> None:
    """Several calls are shared out over the threads, unless they are too few to have work for each."""
    B, H, _, D = q.shape
    threads = torch.get_num_threads()
    if len(found) > 1 and 1 < threads <= B * H:
        shared_out.run(compute, _pieces_of(found, H, D, threads))
        return
    for call in found:
        compute(call)


def _pieces_of(found: list[Call], H: int, D: int, threads: int) -> list[Call]:
    """The longest first, large ones cut into some heads each: that changes no bit."""
    work = [call.pairs() * H * D for call in found]
    most = max(CALL, sum(work) / (2 * threads))
    pieces = []
    for call, size in zip(found, work, strict=True):
        step = math.ceil(H / max(1, math.ceil(size / most)))
        heads = (slice(h, min(h + step, H)) for h in range(0, H, step))
        pieces += [(size * (some.stop - some.start), call._replace(heads=some)) for some in heads]
    return [call for _, call in sorted(pieces, key=operator.itemgetter(0), reverse=True)]


def _place(to: Tensor, some: slice | Tensor, x: Tensor) -> None:
    """x (B, H, some of L, D) into (B, H, L, D), which is 0 elsewhere."""
    if isinstance(some, Tensor):
        to.zero_().transpose(1, 2).index_copy_(1, some, x.transpose(1, 2))
        return
    for to_piece, piece in zip(_pieces(to[:, :, some]), _pieces(x), strict=True):
        to_piece.copy_(piece)
    for rest in (slice(0, some.start), slice(some.stop, to.shape[2])):
        if rest.start < rest.stop:
            _zero(to[:, :, rest])


def _zero(x: Tensor) -> None:
    if 0 < x.numel() < SERIAL:
        x.zero_()
    elif x.numel():
        for piece in _pieces(x):
            piece.zero_()


def _filled(lse: Tensor, dead: Tensor | None, value: float) -> Tensor:
    """(B, H, M), contiguous, with `value` at dead rows."""
    if lse.numel() < SERIAL:
        return (lse if dead is None else lse.masked_fill(dead, value)).contiguous()
    made = lse.new_empty(lse.shape)
    for to_piece, piece in zip(_pieces(made[..., None]), _pieces(lse[..., None]), strict=True):
        to_piece.copy_(piece)
    if dead is not None:
        for to_piece, piece in zip(_pieces(made[..., None]), _pieces(dead.expand_as(made)[..., None]), strict=True):
            to_piece.masked_fill_(piece, value)
    return made


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Of (B, H, L, D), so small that PyTorch takes one thread for each: several would have to wait for each other."""
    _, H, L, D = x.shape
    if x.numel() < SERIAL or torch.get_num_threads() == 1:
        return (x,)
    if H * L * D < SERIAL:
        return x.split((SERIAL - 1) // (H * L * D))
    rows = max(1, (SERIAL - 1) // (H * D))
    return tuple(piece for sequence in x.split(1) for piece in sequence.split(rows, 2))


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """NaN or infinity in a hidden key is NaN in lse where -inf does not outweigh it, and in a hidden value NaN in every row."""
    additive = call.additive(q)
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=additive, scale=scale)
    if call.hidden is not None and _has_nan(lse, out[:, :, 0]):
        k, v = (x.masked_fill(call.hidden.mT, 0) for x in (k, v))
        out, lse = _flash(q, k, v, 0.0, False, attn_mask=additive, scale=scale)
    if call.lengths:
        for b, length in enumerate(call.lengths):
            _zero(out[b : b + 1, :, length:])
    return out, lse


def _backward(call: Call, dout, q, k, v, out, lse, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's weights exp(score - lse) of a dead query are 0 if its lse is inf.

    NaN or infinity in a key or value is NaN in dq, all of a row or one element of all rows; in q or dout, in dk and dv.
    """
    dead = None if call.lengths is None else call.dead()
    if dead is not None:
        lse = _filled(lse, dead, INF)
    additive = call.additive(q)
    grads = _flash_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=additive, scale=scale)
    watched = grads if dead is not None else grads[:1] if call.hidden is not None else ()
    if _has_nan(*(part for x in watched for part in (x[:, :, 0], x[..., 0]))):
        if call.hidden is not None:
            k, v = (x.masked_fill(call.hidden.mT, 0) for x in (k, v))
        if dead is not None:
            q, dout = (x.masked_fill(dead[..., None], 0) for x in (q, dout))
        grads = _flash_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=additive, scale=scale)
    return grads


def _has_nan(*tensors: Tensor) -> bool:
    """A sum of infinities may be NaN too; that costs a call."""
    if all(x.numel() < SERIAL for x in tensors):
        return math.isnan(sum(x.sum().item() for x in tensors))
    return math.isnan(sum(piece.sum().item() for x in tensors for piece in _pieces(x[..., None])))


def calls(mask: LoweredMask, q: Tensor, N: int, backward: bool = False) -> list[Call]:
    """The calls to make, which have all sequences in order; one without rows stands for some that see nothing."""
    B, H, M, D = q.shape
    hidden = None if mask.keys is None else _hidden(mask, B, N)
    extents = _extents(mask, B, M, N, hidden)
    found = _plan(extents, M, N, H, D, _price(), backward)
    if hidden is None and any(call.holes for call in found):
        hidden = _hidden(mask if min(extents.rows) == 0 else mask._replace(query_end=None), B, N)
    return [call.hiding(hidden) if call.holes and hidden is not None else call for call in found]


@functools.lru_cache(maxsize=128)
def _plan(extents: Extents, M: int, N: int, H: int, D: int, price: int, backward: bool) -> list[Call]:
    """Without the tensors of a mask: many layers have one."""
    B = len(extents.rows)
    call_pairs, share, cut = price / (H * D), SHARE / (H * D), CUT / (H * D)
    found = []
    for batch in _groups(extents, call_pairs, share):
        rows, begin, end = extents.box(batch)
        if not rows:
            found.append(Call(batch, slice(0, H), slice(0, 0), slice(0, 0)))
            continue
        if batch == slice(0, B):  # the whole is not cut for little: results would be copied
            width = end - begin
            rows = M if (M - rows) * B * width < cut + COPIED * B * rows else rows
            begin, end = (0, N) if backward and (N - width) * B * rows < cut + 2 * COPIED * B * width else (begin, end)
        count, live = batch.stop - batch.start, sum(extents.lives[batch])
        tail = (end - begin) % VECTOR
        if (TAIL * tail - VECTOR) * count * rows * H * D > MASK:  # the last vector is filled up with keys that are hidden
            end, begin = min(N, end + VECTOR - tail), begin - max(0, min(begin, end + VECTOR - tail - N))
        holes = count * (end - begin) - live
        gathered = count == 1 and holes * rows - GATHERED * live > call_pairs
        lengths = list(extents.rows[batch]) if min(extents.rows[batch]) < rows else None
        found.append(Call(batch, slice(0, H), slice(0, rows), slice(begin, end), holes > 0, gathered, None, lengths))
    return found


def _hidden(mask: LoweredMask, B: int, N: int) -> Tensor:
    """Keys that no query of their sequence sees, bool (B, 1, 1, N)."""
    j = torch.arange(N, dtype=torch.int32)
    parts = []
    if mask.key_end is not None:
        parts.append(j >= mask.key_end[:, None])
    if mask.key_begin is not None:
        parts.append(j < mask.key_begin[:, None])
    if mask.keys is not None:
        parts.append(~mask.keys)
    if mask.query_end is not None:
        parts.append(mask.query_end[:, None] <= 0)
    return functools.reduce(torch.bitwise_or, parts).expand(B, N)[:, None, None]


def _extents(mask: LoweredMask, B: int, M: int, N: int, hidden: Tensor | None) -> Extents:
    begins = [0] * B if mask.key_begin is None else mask.key_begin.tolist()
    ends = [N] * B if mask.key_end is None else [min(end, N) for end in mask.key_end.tolist()]
    rows = [M] * B if mask.query_end is None else [min(end, M) for end in mask.query_end.tolist()]
    if hidden is None:
        lives = [end - begin for begin, end in zip(begins, ends, strict=True)]
    else:
        lives = [N - count for count in hidden.sum(3).flatten().tolist()]
    if min(lives) <= 0 or min(rows) <= 0:
        for b in range(B):
            if lives[b] <= 0 or rows[b] <= 0:
                rows[b], begins[b], ends[b], lives[b] = 0, N, 0, 0
    return Extents(tuple(rows), tuple(begins), tuple(ends), tuple(lives))


def _groups(extents: Extents, price: float, share: float) -> list[slice]:
    """Neighbours share a call where the pairs that this adds cost less than a call; all do if that costs the least."""
    B, pairs = len(extents.rows), extents.pairs
    together = slice(0, B)
    least = sum(map(operator.mul, extents.rows, extents.lives))
    if pairs(together) - least < price:
        return [together]
    found = [slice(0, 1)]
    for b in range(1, B):
        last, one = found[-1], slice(b, b + 1)
        both = slice(last.start, b + 1)
        if pairs(both) - pairs(last) - pairs(one) < price:
            found[-1] = both
        else:
            found.append(one)
    more = sum(1 for group in found if pairs(group)) - 1
    saved, copied = pairs(together) - sum(map(pairs, found)), COPIED * B * max(extents.rows)
    return found if saved >= more * price + share + copied else [together]


def _price() -> int:
    return CALL * max(1, torch.get_num_threads() // 2)  # only one of them at a time is in Python
