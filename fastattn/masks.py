"""Attention masks: which query may attend to which key, with `&` and `|`.

A mask is a conjunction of bounds, kept in closed form, and of terms, which become one bit per pair when M and N are known.
`&` adds to the conjunction; `|` makes a term. `Mask.dense` is the slow definition. In what follows d = j - i for query i and
key j, and a = N - M (`align="bottom_right"`, the last query beside the last key) or 0 (`"top_left"`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.lowering import LoweredMask, Prepared, pack_bits, packed_rows, tile_lists, tile_status
from fastattn.packing import INTEGERS, Integers, Packing, check_bool, int64, integer, integers, lasting, readable
from fastattn.terms import AnyOf, Dense, Grid, Shifted, Term, text

ALIGNMENTS = ("bottom_right", "top_left")
INT32_MAX = 2**31 - 1
CACHED_SHAPES = 8  # (M, N) of one mask whose bits and tiles are kept
VECTORS = ("key_begin", "key_end", "query_end", "prefix_top_left", "prefix_bottom_right")  # (B,)
MATRICES = ("keys", "ids", "key_ids")  # (B, N), (B, M), (B, N)


@dataclass(frozen=True, eq=False)
class Mask:
    """Build one with the functions of this module, combine with `&` and `|`; the fields are the normal form.

    Immutable, and a pytree; its tensors must not be changed after use. Bits and tiles are made once for each (M, N) and kept.

    >>> fastattn.masks.causal() & fastattn.masks.padding([5, 3])
    causal() & padding(int32 (2,))
    """

    low_top_left: int | None = None  # low <= d - a
    low_bottom_right: int | None = None
    high_top_left: int | None = None  # d - a <= high
    high_bottom_right: int | None = None
    prefix_top_left: Tensor | None = None  # j < prefix[b] or d <= a
    prefix_bottom_right: Tensor | None = None
    key_begin: Tensor | None = None
    key_end: Tensor | None = None
    query_end: Tensor | None = None
    keys: Tensor | None = None
    ids: Tensor | None = None
    key_ids: Tensor | None = None  # None: equal to ids
    terms: tuple[Term, ...] = ()
    _bits: dict = field(default_factory=dict, init=False, repr=False)
    prepared: dict = field(default_factory=dict, init=False, repr=False)  # for calls that were checked, by what they were of

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        keys = _both(torch.logical_and, self.keys, other.keys)
        key_begin = _both(torch.maximum, self.key_begin, other.key_begin)
        key_end = _both(torch.minimum, self.key_end, other.key_end)
        if keys is not None and self.keys is not None and other.keys is not None:
            key_begin, live_end = _live_range(keys)  # holes of two masks may hide what was the first live key of each
            key_end = _both(torch.minimum, key_end, live_end)
        terms = self.terms + other.terms
        if self.ids is not None and other.ids is not None:  # one pair of ids has a place, the other becomes bits
            terms = (*terms, AnyOf((Mask(ids=other.ids, key_ids=other.key_ids),)))
        return Mask(
            low_top_left=_both(max, self.low_top_left, other.low_top_left),
            low_bottom_right=_both(max, self.low_bottom_right, other.low_bottom_right),
            high_top_left=_both(min, self.high_top_left, other.high_top_left),
            high_bottom_right=_both(min, self.high_bottom_right, other.high_bottom_right),
            prefix_top_left=_both(torch.minimum, self.prefix_top_left, other.prefix_top_left),
            prefix_bottom_right=_both(torch.minimum, self.prefix_bottom_right, other.prefix_bottom_right),
            key_begin=key_begin,
            key_end=key_end,
            query_end=_both(torch.minimum, self.query_end, other.query_end),
            keys=keys,
            ids=other.ids if self.ids is None else self.ids,
            key_ids=other.key_ids if self.ids is None else self.key_ids,
            terms=terms,
        )

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(terms=(AnyOf((self, other)),))

    def __repr__(self) -> str:
        """The functions that make such a mask; of a tensor its dtype and shape."""
        parts = [
            *_window_text(self.low_bottom_right, self.high_bottom_right),
            *_window_text(self.low_top_left, self.high_top_left, "top_left"),
        ]
        if self.keys is not None:
            parts.append(text("key_padding", self.keys))
        if self.query_end is not None:
            parts.append(text("padding", self.key_end, self.query_end))
        elif self.key_end is not None and self.keys is None:
            parts.append(text("padding", self.key_end))
        if self.prefix_bottom_right is not None:
            parts.append(text("prefix_lm", self.prefix_bottom_right))
        if self.prefix_top_left is not None:
            parts.append(text("prefix_lm", self.prefix_top_left, "top_left"))
        if self.ids is not None:
            parts.append(text("documents", *(x for x in (self.ids, self.key_ids) if x is not None)))
        alone = len(parts) + len(self.terms) == 1
        parts += [f"({term})" if " | " in str(term) and not alone else str(term) for term in self.terms]
        return " & ".join(parts) or "full()"

    def lower(self, M: int, N: int, device: torch.device | None = None) -> LoweredMask:
        """The mask for M queries and N keys. `device` is where bits are made; that of the mask's tensors if it has any."""
        terms, bounds = self.terms, self._bounds(M, N)
        if self.prefix_top_left is not None and self.prefix_bottom_right is not None:  # kernels take one prefix
            terms = (*terms, AnyOf((Mask(key_end=self.prefix_top_left), causal("top_left"))))
        if not terms and self.ids is None:
            return bounds
        device = self.device() or device
        if torch.compiler.is_compiling():
            return bounds._replace(**_bits_and_tiles(bounds, terms, M, N, device))
        made = self._bits.get((M, N, device))
        if made is None:
            with lasting():
                made = _bits_and_tiles(bounds, terms, M, N, device)
            self._keep((M, N, device), made, made.values())
        return bounds._replace(**made)

    def lower_packed(self, packing: Packing, key_packing: Packing, H: int) -> LoweredMask:
        """The mask for packed sequences, whose queries and keys count from 0 in each. Raises ValueError if it does not fit."""
        S, M, N, device = packing.lengths.numel(), packing.max_length, key_packing.max_length, packing.cu_seqlens.device
        mask = self._bits.get((packing, key_packing))
        with lasting():
            made = self._by_rank(packing, key_packing) if mask is None else mask
            made.check(S, H, M, N, device)  # H may be another one than when it was made
            if mask is None:
                mask = made
                if packing is not key_packing:
                    mask = mask._shifted((key_packing.lengths - packing.lengths).long()[:, None, None, None])
                if mask.terms or mask.ids is not None:
                    mask = mask & padding(key_packing.lengths, packing.lengths)  # tiles beyond a sequence are not to be visited
                    self._keep((packing, key_packing), mask, [packing.cu_seqlens, key_packing.cu_seqlens])
        return mask.lower(M, N, device)._replace(**packed_fields(packing, key_packing))

    def _keep(self, key: tuple, made: Any, tensors: Iterable[Tensor | None]) -> None:
        """Unless the tensors are those of a trace, or in the memory of a CUDA graph that is being captured."""
        if torch.compiler.is_compiling() or not may_keep(tensors):
            return
        if len(self._bits) >= CACHED_SHAPES:
            self._bits.clear()
        self._bits[key] = made

    def keep_prepared(self, key: tuple, prepared: Prepared) -> None:
        if may_keep(prepared.tensors):
            if len(self.prepared) >= CACHED_SHAPES:
                self.prepared.clear()
            self.prepared[key] = prepared

    def _by_rank(self, packing: Packing, key_packing: Packing) -> Mask:
        """With ids of packed tokens, (T,), as ids of ranks, (S, max_length); -1 beyond the end of a sequence."""
        terms = tuple(term.by_rank(packing, key_packing) if isinstance(term, AnyOf) else term for term in self.terms)
        if self.ids is None:
            return replace(self, terms=terms)
        if self.key_ids is None and packing is not key_packing:
            raise ValueError("mask: documents need key_ids where queries and keys are packed differently")
        ids = _ids_by_rank(self.ids, packing, "ids")
        return replace(
            self,
            ids=ids,
            key_ids=None if self.key_ids is None else _ids_by_rank(self.key_ids, key_packing, "key_ids"),
            terms=terms,
        )

    def _shifted(self, delta: Tensor) -> Mask:
        """With all that depends on N - M as one term, where that is `delta`, (S, 1, 1, 1), for each sequence."""
        aligned = Mask(
            low_bottom_right=self.low_bottom_right, high_bottom_right=self.high_bottom_right,
            prefix_bottom_right=self.prefix_bottom_right, terms=self.terms,
        )  # fmt: skip
        if not self.terms and self.low_bottom_right is self.high_bottom_right is self.prefix_bottom_right is None:
            return self
        terms = (Shifted(aligned, delta),)
        return replace(self, low_bottom_right=None, high_bottom_right=None, prefix_bottom_right=None, terms=terms)

    def _bounds(self, M: int, N: int) -> LoweredMask:
        """All but the terms: alignments become bounds on j - i."""
        delta = N - M
        low = _both(max, self.low_top_left, None if self.low_bottom_right is None else self.low_bottom_right + delta)
        high = _both(min, self.high_top_left, None if self.high_bottom_right is None else self.high_bottom_right + delta)
        prefix, prefix_high = self.prefix_top_left, None if self.prefix_top_left is None else 0
        if self.prefix_bottom_right is not None:
            prefix, prefix_high = self.prefix_bottom_right, delta
        key_ids = self.ids if self.key_ids is None else self.key_ids
        ranges = self.key_begin, self.key_end, self.query_end
        return LoweredMask(low, high, prefix_high, prefix, *ranges, self.keys, self.ids, key_ids)

    def dense(self, B: int, H: int, M: int, N: int, device: torch.device | str | None = None) -> Tensor:
        """The definition, as a bool tensor (B, H, M, N), True = may attend. Slow: for tests and for looking at a mask."""
        device = torch.empty(0, device=device).device if device is not None else self.device()  # "cuda" is the current GPU
        self.check(B, H, M, N, device)
        return self.pairs(M, N, device).expand(B, H, M, N)

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        """The definition at the shape that the mask itself has: bool, (B or 1, H or 1, M or 1, N or 1).

        delta: (B, 1, 1, 1), what is N - M for each sequence of a packed batch.
        """
        i, j = torch.arange(M, device=device), torch.arange(N, device=device)
        if delta is None:
            result = self._bounds(M, N).pairs(i, j)
            if self.prefix_top_left is not None and self.prefix_bottom_right is not None:
                result = result & Mask(prefix_top_left=self.prefix_top_left).pairs(M, N, device)
        else:
            low, high = (None if x is None else x + delta for x in (self.low_bottom_right, self.high_bottom_right))
            shifted = LoweredMask(low, high, delta, self.prefix_bottom_right)  # type: ignore[arg-type]
            rest = replace(self, low_bottom_right=None, high_bottom_right=None, prefix_bottom_right=None)
            result = shifted.pairs(i, j) & rest._bounds(M, N).pairs(i, j)
        for term in self.terms:
            result = result & term.pairs(M, N, device, delta)
        return result

    def device(self) -> torch.device | None:
        """Where the mask's tensors are; None if it has none."""
        for tensor in (getattr(self, name) for name in VECTORS + MATRICES):
            if tensor is not None:
                return tensor.device
        devices = [term.device() for term in self.terms]
        return next((device for device in devices if device is not None), None)

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None = None) -> None:
        """Raise ValueError if a tensor of the mask does not fit (B, H, M, N) or lies on another device."""
        for name in VECTORS + MATRICES:
            tensor = getattr(self, name)
            if tensor is None:
                continue
            expected = (B,) if name in VECTORS else (B, M) if name == "ids" else (B, N)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"mask: {name} has shape {tuple(tensor.shape)}, but this call needs {expected}")
            if device is not None and tensor.device != device:
                raise ValueError(f"mask is on {tensor.device}, but q is on {device}; build the mask on q's device")
        if self.ids is not None and self.key_ids is None and M != N:
            raise ValueError(f"mask: documents of {M} queries and {N} keys need key_ids")
        for term in self.terms:
            term.check(B, H, M, N, device)


torch.export.register_dataclass(Mask)


def full() -> Mask:
    """Every query sees every key.

    >>> fastattn.masks.full().dense(1, 1, 2, 3)[0, 0].long()
    tensor([[1, 1, 1],
            [1, 1, 1]])
    """
    return Mask()


def window(left: int | None, right: int | None, align: str = "bottom_right") -> Mask:
    """-left <= d - a <= right: keys up to `left` before and `right` after the query's own; None = no bound.

    >>> fastattn.masks.window(1, 0).dense(1, 1, 3, 3)[0, 0].long()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]])
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}")
    left, right = (None if x is None else integer(x, name) for name, x in (("left", left), ("right", right)))
    low = None if left is None else -left
    if align == "top_left":
        return Mask(low_top_left=low, high_top_left=right)
    return Mask(low_bottom_right=low, high_bottom_right=right)


def causal(align: str = "bottom_right") -> Mask:
    """d <= a: the last query sees every key ("bottom_right"), or the first sees just the first key ("top_left").

    >>> fastattn.masks.causal().dense(1, 1, 2, 3)[0, 0].long()  # 2 queries, 3 keys
    tensor([[1, 1, 0],
            [1, 1, 1]])
    """
    return window(None, 0, align)


def padding(key_lengths: Integers, query_lengths: Integers | None = None) -> Mask:
    """Sequence b has key_lengths[b] real keys, and query_lengths[b] real queries, at its start.

    Both are integers of shape (B,). Rows beyond query_lengths see nothing: their output is 0 and they cost nothing.
    Lengths below 0 count as 0, lengths beyond the tensor as its size.

    >>> fastattn.masks.padding([3, 1]).dense(2, 1, 1, 3)[:, 0, 0].long()
    tensor([[1, 1, 1],
            [1, 0, 0]])
    """
    query_end = None if query_lengths is None else _lengths(query_lengths, "query_lengths")
    return Mask(key_end=_lengths(key_lengths, "key_lengths"), query_end=query_end)


def key_padding(keep: Tensor) -> Mask:
    """keep: bool (B, N), True = a real key. Padding may be on the right, on the left or anywhere between.

    >>> fastattn.masks.key_padding(torch.tensor([[False, True]])).dense(1, 1, 2, 2)[0, 0].long()
    tensor([[0, 1],
            [0, 1]])
    """
    check_bool(keep, "keep")
    if keep.dim() != 2:
        raise ValueError(f"keep must have shape (B, N), got {tuple(keep.shape)}")
    key_begin, key_end = _live_range(keep)
    if not torch.compiler.is_compiling() and keep.is_inference():
        with lasting():
            keep = keep.clone()
    return Mask(keys=keep, key_begin=key_begin, key_end=key_end)


def prefix_lm(lengths: Integers, align: str = "bottom_right") -> Mask:
    """j < lengths[b] or d <= a: causal, but every query sees the first lengths[b] keys. lengths: integers (B,).

    >>> fastattn.masks.prefix_lm([2]).dense(1, 1, 3, 3)[0, 0].long()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]])
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}")
    prefix = _lengths(lengths, "lengths")
    return Mask(prefix_top_left=prefix) if align == "top_left" else Mask(prefix_bottom_right=prefix)


def documents(ids: Tensor, key_ids: Tensor | None = None) -> Mask:
    """A query sees the keys of its own document: ids equal and >= 0.

    ids: integers (B, M), or (T,) of packed sequences; key_ids (B, N) or (Tk,), needed when the keys are others than the queries,
    else equal to ids. A negative id is in no document. Ids must be
    below 2^31, which is looked at on a CPU only: a GPU would wait for it. In any order; tiles are skipped best where a document's
    tokens lie together.

    >>> fastattn.masks.documents(torch.tensor([[0, 0, 1, -1]])).dense(1, 1, 4, 4)[0, 0].long()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 0]])
    """
    return Mask(ids=_ids(ids, "ids"), key_ids=None if key_ids is None else _ids(key_ids, "key_ids"))


def rows(h: int, w: int, prefix: int = 0) -> Mask:
    """`prefix` tokens of text, causal, then an image of h x w tokens: each sees the prefix and its own row up to itself.

    Query i stands at x = i + N - M. Fewer keys than prefix + h * w are the beginning of the sequence.

    >>> fastattn.masks.rows(2, 2, prefix=1).dense(1, 1, 5, 5)[0, 0, 4].long()  # the last pixel: text, its left neighbour, itself
    tensor([1, 0, 0, 1, 1])
    """
    return _grid(h, w, 0, w, prefix)


def columns(h: int, w: int, prefix: int = 0) -> Mask:
    """As `rows`, with the token's own column.

    >>> fastattn.masks.columns(2, 2, prefix=1).dense(1, 1, 5, 5)[0, 0, 4].long()  # text, the pixel above, itself
    tensor([1, 0, 1, 0, 1])
    """
    return _grid(h, w, h, 0, prefix)


def conv(h: int, w: int, kernel: int, prefix: int = 0) -> Mask:
    """As `rows`, with the part before it of the square of side `kernel` (odd) around the token.

    >>> fastattn.masks.conv(2, 3, kernel=3).dense(1, 1, 6, 6)[0, 0, 3].long()  # below the first: that, the one beside it, itself
    tensor([1, 1, 0, 1, 0, 0])
    """
    kernel = integer(kernel, "kernel")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel}")
    return _grid(h, w, kernel // 2, kernel // 2, prefix)


def dense(keep: Tensor) -> Mask:
    """keep: bool, broadcastable to (B, H, M, N), True = may attend. `attention` takes the tensor itself as well.

    One that does not depend on the head or the query, (B, 1, 1, N), becomes a `key_padding`. A tensor is packed into bits on
    first use of its Mask, so what serves many calls is best made a Mask once.

    >>> fastattn.masks.dense(torch.ones(2, 1, 1, 4, dtype=torch.bool))
    key_padding(bool (2, 4))
    """
    check_bool(keep, "mask")
    if keep.dim() > 4:
        raise ValueError(f"mask must broadcast to (B, H, M, N), got {tuple(keep.shape)}")
    keep = keep.reshape((1,) * (4 - keep.dim()) + tuple(keep.shape))
    if keep.shape[1] == keep.shape[2] == 1 and keep.shape[0] > 1 and keep.shape[3] > 1:
        return key_padding(keep[:, 0, 0, :])
    return Mask(terms=(Dense(keep),))


def _bits_and_tiles(bounds: LoweredMask, terms: tuple, M: int, N: int, device: torch.device | None) -> dict[str, Any]:
    """The bits of the terms, and the tiles to visit under the whole mask."""
    pairs = None
    for term in terms:
        pairs = term.pairs(M, N, device) if pairs is None else pairs & term.pairs(M, N, device)
    status = tile_status(bounds, M, N, device, pairs)
    bits = None if pairs is None else pack_bits(pairs)
    return {"bits": bits, "key_tiles": tile_lists(status), "query_tiles": tile_lists(status.mT)}


def may_keep(tensors) -> bool:
    """Not those of a trace, nor those in the memory of a CUDA graph that is being captured."""
    present = [x for x in tensors if x is not None]
    if any(type(x) is not Tensor for x in present):
        return False
    return not present or present[0].device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def packed_fields(packing: Packing, key_packing: Packing) -> dict[str, Any]:
    """What a LoweredMask says of the sequences themselves."""
    return {
        "query_starts": packing.cu_seqlens,
        "key_starts": key_packing.cu_seqlens,
        "max_queries": packing.max_length,
        "max_keys": key_packing.max_length,
        "all_rows": packing.full and key_packing.full,
    }


def _ids_by_rank(ids: Tensor, packing: Packing, name: str) -> Tensor:
    if ids.dim() != 1 or (packing.trusted and ids.shape[0] != packing.capacity):
        raise ValueError(f"mask: {name} of packed sequences must have shape ({packing.capacity},), got {tuple(ids.shape)}")
    if ids.device != packing.cu_seqlens.device:
        raise ValueError(f"mask is on {ids.device}, but the packing is on {packing.cu_seqlens.device}")
    return torch.nn.functional.pad(ids, (0, 1), value=-1)[packed_rows(packing.cu_seqlens, packing.max_length, ids.shape[0])]


def _window_text(low: int | None, high: int | None, *align: str) -> list[str]:
    if low is None and high is None:
        return []
    return [text("causal", *align) if (low, high) == (None, 0) else text("window", None if low is None else -low, high, *align)]


def _both(combine, a, b):
    if a is None or b is None:
        return b if a is None else a
    with lasting():
        return combine(a, b)


def _grid(h: int, w: int, row_reach: int, column_reach: int, prefix: int) -> Mask:
    for name, size, least in (("h", h, 1), ("w", w, 1), ("prefix", prefix, 0)):
        if integer(size, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    sizes = (integer(size, "a size") for size in (h, w, row_reach, column_reach, prefix))
    return Mask(terms=(Grid(*sizes),))


def _ids(ids: Tensor, name: str) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        hint = f": pass torch.from_numpy({name})" if got == "ndarray" else ""
        raise TypeError(f"{name} must be a tensor of integers, got {got}{hint}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape (B, length), or (T,) of packed sequences, got {tuple(ids.shape)}")
    with lasting():
        wide = int64(ids, name)
        if readable(ids) and ids.numel() and int(wide.max()) > INT32_MAX:  # elsewhere it would wait
            raise ValueError(f"{name} must be below 2^31, got {int(wide.max())}")
        return wide.clamp(-1, INT32_MAX).to(torch.int32)


def _lengths(lengths: Integers, name: str) -> Tensor:
    with lasting():
        return integers(lengths, name).clamp(0, INT32_MAX).to(torch.int32)


def _live_range(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first live key and one past the last, (B,) int32 each; an empty range where there is none."""
    B, N = keep.shape
    with lasting():
        if N == 0:
            return keep.new_zeros(B, dtype=torch.int32), keep.new_zeros(B, dtype=torch.int32)
        j = torch.arange(N, device=keep.device, dtype=torch.int32)
        return torch.where(keep, j, N).amin(1), torch.where(keep, j + 1, 0).amax(1)
