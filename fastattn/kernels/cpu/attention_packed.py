"""Packed sequences on a CPU: a call for each, or for neighbours of one length where no mask tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastattn.lowering import LoweredMask

_kept = WeakTensorKeyDictionary()  # a packed mask's lists of tiles, which its Mask keeps alive -> sequence -> its own mask


class Run(NamedTuple):
    """`count` sequences of M queries and N keys, with these first rows."""

    number: int  # of the first sequence
    count: int
    M: int
    N: int
    query: int
    key: int
    mask: LoweredMask

    def queries(self, x: Tensor) -> Tensor:
        """A view (count, H, M, D) of (1, H, T, D)."""
        return x[0, :, self.query : self.query + self.count * self.M].unflatten(1, (self.count, self.M)).transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        return x[0, :, self.key : self.key + self.count * self.N].unflatten(1, (self.count, self.N)).transpose(0, 1)


def forward(run_dense: Callable, q, k, v, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    """`run_dense` is the padded forward, which here gets no padding."""
    _, H, T, _ = q.shape
    out = q.new_zeros(1, T, H, v.shape[3]).transpose(1, 2)
    lse = q.new_full((1, H, T, 1), float("-inf"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for run in runs(mask, T, k.shape[2]):
        found, found_lse = run_dense(run.queries(q), run.keys(k), run.keys(v), run.mask, scale, exact_lse)
        run.queries(out).copy_(found)
        run.queries(lse).copy_(found_lse[..., None])
    return out, lse[..., 0]


def backward(run_dense: Callable, dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float):
    lse, dlse = lse[..., None], None if dlse is None else dlse[..., None]
    grads = [x.new_zeros(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]
    for run in runs(mask, q.shape[2], k.shape[2]):
        lse_grad = None if dlse is None else run.queries(dlse)[..., 0]
        keys, values, result_lse = run.keys(k), run.keys(v), run.queries(lse)[..., 0].contiguous()
        given = run.queries(dout), lse_grad, run.queries(q), keys, values, run.queries(out), result_lse
        dq, dk, dv = run_dense(*given, run.mask, scale)
        run.queries(grads[0]).copy_(dq)
        run.keys(grads[1]).copy_(dk)
        run.keys(grads[2]).copy_(dv)
    return tuple(grads)


def runs(mask: LoweredMask, Tq: int, Tk: int, alone: bool = False) -> Iterator[Run]:
    """What no query or no key is in has the result of no key: 0. alone: something else tells the sequences apart too."""
    queries, keys = _ends(mask.query_starts, Tq, mask.max_queries), _ends(mask.key_starts, Tk, mask.max_keys)
    bounds = LoweredMask(mask.low, mask.high, mask.prefix_high)
    alone = alone or mask.bits is not None or any(x is not None for x in mask[3:10])
    run = None
    for b, ((query, query_end), (key, key_end)) in enumerate(zip(queries, keys, strict=True)):
        M, N = query_end - query, key_end - key
        if M <= 0 or N <= 0:
            continue
        if alone:
            yield Run(b, 1, M, N, query, key, _of_sequence(mask, b, M, N))
        elif run is not None and run[2:] == (M, N, query - run.count * M, key - run.count * N, bounds):
            run = run._replace(count=run.count + 1)
        else:
            if run is not None:
                yield run
            run = Run(b, 1, M, N, query, key, bounds)
    if run is not None:
        yield run


def _ends(starts: Tensor, rows: int, longest: int) -> list[tuple[int, int]]:
    """The rows of each sequence, among those that there are."""
    places = [min(max(place, 0), rows) for place in starts.tolist()]
    return [(begin, min(end, begin + longest)) for begin, end in zip(places, places[1:], strict=False)]


def _of_sequence(mask: LoweredMask, b: int, M: int, N: int) -> LoweredMask:
    """The mask of sequence b alone. Its lists of tiles are not read: they stand for it where plans are kept."""
    if mask.key_tiles is None:
        return _sliced(mask, b, M, N)
    found = _kept.setdefault(mask.key_tiles, {})
    if (b, M, N) not in found:
        found[b, M, N] = _sliced(mask, b, M, N)
    return found[b, M, N]


def _sliced(mask: LoweredMask, b: int, M: int, N: int) -> LoweredMask:
    def cut(x: Tensor | None, *lengths: int) -> Tensor | None:
        if x is None:
            return None
        x = x[b : b + 1] if x.shape[0] > 1 else x[:1]
        for dim, length in enumerate(lengths, x.dim() - len(lengths)):
            x = x if x.shape[dim] == 1 else x.narrow(dim, 0, length)
        return x

    vectors = (cut(x) for x in (mask.prefix, mask.key_begin, mask.key_end, mask.query_end))
    matrices = cut(mask.keys, N), cut(mask.ids, M), cut(mask.key_ids, N)
    bits = cut(mask.bits, M, -(-N // 32))
    if bits is not None and N % 32 and bits.shape[3] == -(-N // 32):  # none set beyond the last key
        last = torch.zeros(bits.shape[3], dtype=torch.int32)
        last[-1] = -1 << N % 32
        bits = bits & ~last
    return LoweredMask(mask.low, mask.high, mask.prefix_high, *vectors, *matrices, bits, cut(mask.key_tiles))
