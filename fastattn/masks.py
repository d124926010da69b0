"""Attention masks: which query may attend to which key, in a form that kernels evaluate without an M x N tensor.

A mask is a conjunction of at most: the causal band in either alignment, a range of keys and of queries per sequence,
one bit per key, and one bit per pair. `&` stays inside that form. `Mask.dense` is the slow definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENTS = ("bottom_right", "top_left")
INT32_MAX = 2**31 - 1


class LoweredMask(NamedTuple):
    """What an op and its kernels receive once M and N are known. Pair (i, j) of sequence b, head h is visible iff all hold."""

    diagonal: int | None = None  # j - i <= diagonal
    key_begin: Tensor | None = None  # (B,) int32: key_begin[b] <= j
    key_end: Tensor | None = None  # (B,) int32: j < key_end[b]
    query_end: Tensor | None = None  # (B,) int32: i < query_end[b]
    keys: Tensor | None = None  # (B, N) bool: keys[b, j]
    pairs: Tensor | None = None  # bool, four dimensions, each 1 or that of (B, H, M, N): pairs[b, h, i, j]

    def visible(self, B: int, H: int, M: int, N: int, device: torch.device | None = None) -> Tensor:
        """The conjunction as a bool tensor (B, H, M, N)."""
        i = torch.arange(M, device=device)[:, None]
        j = torch.arange(N, device=device)
        result = torch.ones(B, H, M, N, dtype=torch.bool, device=device)
        if self.diagonal is not None:
            result &= j - i <= self.diagonal
        if self.key_begin is not None:
            result &= j >= self.key_begin[:, None, None, None]
        if self.key_end is not None:
            result &= j < self.key_end[:, None, None, None]
        if self.query_end is not None:
            result &= i < self.query_end[:, None, None, None]
        if self.keys is not None:
            result &= self.keys[:, None, None, :]
        if self.pairs is not None:
            result &= self.pairs
        return result


@dataclass(frozen=True, eq=False)
class Mask:
    """Build one with `causal`, `padding`, `key_padding` or `dense`, combine with `&`; the fields are the normal form.

    Immutable, and a pytree; its tensors must not be changed after use.
    """

    causal_top_left: bool = False
    causal_bottom_right: bool = False
    key_begin: Tensor | None = None
    key_end: Tensor | None = None
    query_end: Tensor | None = None
    keys: Tensor | None = None
    pairs: Tensor | None = None

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        keys = _both(torch.logical_and, self.keys, other.keys)
        key_begin: Tensor | None
        if keys is not None and self.keys is not None and other.keys is not None:
            key_begin, live_end = _live_range(keys)  # holes of two masks may hide what was the first live key of each
            key_end = _both(torch.minimum, _both(torch.minimum, self.key_end, other.key_end), live_end)
        else:
            key_begin = _both(torch.maximum, self.key_begin, other.key_begin)
            key_end = _both(torch.minimum, self.key_end, other.key_end)
        return Mask(
            causal_top_left=self.causal_top_left or other.causal_top_left,
            causal_bottom_right=self.causal_bottom_right or other.causal_bottom_right,
            key_begin=key_begin,
            key_end=key_end,
            query_end=_both(torch.minimum, self.query_end, other.query_end),
            keys=keys,
            pairs=_both(torch.logical_and, self.pairs, other.pairs),
        )

    def lower(self, M: int, N: int) -> LoweredMask:
        """The mask for M queries and N keys: alignments become one bound on j - i."""
        diagonal = None
        if self.causal_top_left:
            diagonal = 0
        if self.causal_bottom_right:
            diagonal = N - M if diagonal is None else min(diagonal, N - M)
        return LoweredMask(diagonal, self.key_begin, self.key_end, self.query_end, self.keys, self.pairs)

    def dense(self, B: int, H: int, M: int, N: int, device: torch.device | str | None = None) -> Tensor:
        """The definition, as a bool tensor (B, H, M, N), True = may attend. Slow: for tests and for looking at a mask."""
        tensors = (self.key_begin, self.key_end, self.query_end, self.keys, self.pairs)
        found = next((t.device for t in tensors if t is not None), None)
        device = torch.device(device) if device is not None else found
        self.check(B, H, M, N, device)
        return self.lower(M, N).visible(B, H, M, N, device)

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None = None) -> None:
        """Raise ValueError if a tensor of the mask does not fit (B, H, M, N) or lies on another device."""
        for name in ("key_begin", "key_end", "query_end", "keys"):
            tensor = getattr(self, name)
            expected = (B, N) if name == "keys" else (B,)
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"mask: {name} has shape {tuple(tensor.shape)}, but this call needs {expected}")
        if self.pairs is not None:
            for size, expected_size in zip(self.pairs.shape, (B, H, M, N), strict=True):
                if size != 1 and size != expected_size:
                    shape = tuple(self.pairs.shape)
                    raise ValueError(f"mask: a bool tensor of shape {shape} does not broadcast to {(B, H, M, N)}")
        for tensor in (self.key_begin, self.key_end, self.query_end, self.keys, self.pairs):
            if tensor is not None and device is not None and tensor.device != device:
                raise ValueError(f"mask is on {tensor.device}, but q is on {device}; build the mask on q's device")


torch.export.register_dataclass(Mask)


def causal(align: str = "bottom_right") -> Mask:
    """Query i sees key j iff j - i <= a, with a = N - M for "bottom_right" and 0 for "top_left"."""
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}")
    return Mask(causal_top_left=align == "top_left", causal_bottom_right=align == "bottom_right")


def padding(key_lengths: Tensor | Sequence[int], query_lengths: Tensor | Sequence[int] | None = None) -> Mask:
    """Sequence b has key_lengths[b] real keys, and query_lengths[b] real queries, at its start.

    Both are integers of shape (B,). Rows beyond query_lengths see nothing: their output is 0 and they cost nothing.
    Lengths below 0 count as 0, lengths beyond the tensor as its size.
    """
    query_end = None if query_lengths is None else _lengths(query_lengths, "query_lengths")
    return Mask(key_end=_lengths(key_lengths, "key_lengths"), query_end=query_end)


def key_padding(keep: Tensor) -> Mask:
    """keep: bool (B, N), True = a real key. Padding may be on the right, on the left or anywhere between."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep must be a bool tensor, got {got}; for a 0/1 attention_mask pass attention_mask.bool()")
    if keep.dim() != 2:
        raise ValueError(f"keep must have shape (B, N), got {tuple(keep.shape)}")
    key_begin, key_end = _live_range(keep)
    return Mask(keys=keep, key_begin=key_begin, key_end=key_end)


def dense(keep: Tensor) -> Mask:
    """keep: bool, broadcastable to (B, H, M, N), True = may attend. `attention` takes the tensor itself as well.

    One that does not depend on the head or the query, (B, 1, 1, N), becomes a `key_padding`.
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"mask must be a Mask or a bool tensor (True = may attend), got {keep.dtype}")
    if keep.dim() > 4:
        raise ValueError(f"mask must broadcast to (B, H, M, N), got {tuple(keep.shape)}")
    keep = keep.reshape((1,) * (4 - keep.dim()) + tuple(keep.shape))
    if keep.shape[1] == keep.shape[2] == 1 and keep.shape[0] > 1 and keep.shape[3] > 1:
        return key_padding(keep[:, 0, 0, :])
    return Mask(pairs=keep)


def _both(combine, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return combine(a, b)


def _lengths(lengths: Tensor | Sequence[int], name: str) -> Tensor:
    tensor = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths or (), dtype=None if lengths else torch.int32)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have shape (B,), got {tuple(tensor.shape)}")
    return tensor.clamp(0, INT32_MAX).to(torch.int32)


def _live_range(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first live key and one past the last, (B,) int32 each; an empty range where there is none."""
    B, N = keep.shape
    if N == 0:
        return keep.new_zeros(B, dtype=torch.int32), keep.new_zeros(B, dtype=torch.int32)
    j = torch.arange(N, device=keep.device, dtype=torch.int32)
    return torch.where(keep, j, N).amin(1), torch.where(keep, j + 1, 0).amax(1)
