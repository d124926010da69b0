"""Biases on attention scores that depend on the distance of key and query alone, and so are never made for each pair.

In what follows d = j - i - a for query i and key j, with a = N - M (`align="bottom_right"`, the last query beside the last key)
or 0 (`"top_left"`). Any other bias is passed to `attention` as a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.lowering import Extras
from fastattn.masks import ALIGNMENTS, may_keep
from fastattn.packing import lasting

_BUCKETS: dict[tuple, Tensor] = {}  # by arguments and device; a few hundred bytes each


@dataclass(frozen=True, eq=False)
class Bias:
    """Build one with `relative` or `alibi`. A pytree; its tensors must not be changed between a forward pass and its backward."""

    table: Tensor | None = None
    buckets: Tensor | None = None
    slopes: Tensor | None = None
    align: str = "top_left"

    def extras(self) -> Extras:
        """What kernels receive."""
        table = None if self.table is None else self.table.contiguous()
        return Extras(None, table, self.buckets, self.slopes, self.align == "bottom_right")

    def check(self, B: int, H: int, q: Tensor) -> None:
        """Raise ValueError or TypeError unless it fits B sequences and H query heads of q's dtype and device."""
        tensor, name = (self.table, "table") if self.table is not None else (self.slopes, "slopes")
        assert tensor is not None
        if tensor.device != q.device:
            raise ValueError(f"bias: {name} is on {tensor.device}, but q is on {q.device}")
        if self.table is not None:
            check_dtype(self.table, q, "bias: table")
            if self.table.shape[1] != H:
                raise ValueError(f"bias: table has {self.table.shape[1]} columns, but q has {H} heads")
        elif tensor.shape[1] != H or tensor.shape[0] not in (1, B):
            raise ValueError(f"bias: slopes of shape {tuple(tensor.shape)} fit neither ({H},) nor ({B}, {H})")

    def dense(self, M: int, N: int) -> Tensor:
        """The bias for each pair, (B or 1, H, M, N), differentiable in the table: the slow definition that tests use."""
        bias = bias_of(self.extras(), M, N)
        return bias if bias.dim() == 4 else bias[None]


def relative(
    table: Tensor, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128, align: str = "top_left"
) -> Bias:
    """T5's relative position bias: table[bucket(d), h], with a gradient to the table.

    Args:
        table: (num_buckets, H), fp32 or the dtype of q.
        bidirectional: keys after the query have the upper half of the buckets; else they share the query's own.
        num_buckets, max_distance: half of a direction's buckets hold one distance each, the others grow as its logarithm up to
            max_distance, and the last holds all beyond.
        align: where d is 0. T5 counts from the first query and key; "bottom_right" is for decoding with a cache.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.

    The buckets are those of Raffel et al., "Exploring the limits of transfer learning" (2020), arXiv:1910.10683.

    >>> fastattn.biases.relative(torch.arange(32.0)[:, None]).dense(2, 3)[0, 0]  # a table that names its buckets
    tensor([[ 0., 17., 18.],
            [ 1.,  0., 17.]])
    """
    _check_matrix(table, "table")
    _check_align(align)
    least = 4 if bidirectional else 2
    if num_buckets < least or (bidirectional and num_buckets % 2):
        kind = "an even number of at least 4" if bidirectional else "at least 2"
        raise ValueError(f"num_buckets must be {kind}, got {num_buckets}")
    if table.dim() != 2 or table.shape[0] != num_buckets:
        raise ValueError(f"table must have shape ({num_buckets}, heads) for num_buckets={num_buckets}, got {tuple(table.shape)}")
    if max_distance <= num_buckets // least:
        raise ValueError(f"max_distance must be above {num_buckets // least}, the distances that have a bucket each")
    return Bias(table=table, buckets=_buckets(bidirectional, num_buckets, max_distance, table.device), align=align)


def alibi(slopes: Tensor, align: str = "bottom_right") -> Bias:
    """-slope |d| (Press et al., "Train short, test long", 2022, arXiv:2108.12409), for slopes (H,) or (B, H), which get no
    gradient.

    Raises ValueError or TypeError for other slopes, and for slopes that require a gradient.

    >>> fastattn.biases.alibi(torch.tensor([0.5]), align="top_left").dense(1, 4)[0, 0]
    tensor([[-0.0000, -0.5000, -1.0000, -1.5000]])
    """
    _check_matrix(slopes, "slopes")
    _check_align(align)
    if slopes.dim() not in (1, 2):
        raise ValueError(f"slopes must have shape (H,) or (B, H), got {tuple(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("slopes require a gradient, which alibi does not give: pass slopes.detach()")
    return Bias(slopes=slopes.reshape(-1, slopes.shape[-1]).float().contiguous(), align=align)


def bias_of(extras: Extras, M: int, N: int, a: Tensor | int | None = None) -> Tensor:
    """The bias by pairs, (B or 1, H or 1, M or 1, N or 1)."""
    if extras.bias is not None:
        return extras.bias
    if extras.table is not None:
        return extras.table[bucket_of(extras, M, N, a)].movedim(-1, -3)  # (..., M, N, H) -> (..., H, M, N)
    assert extras.slopes is not None
    return -extras.slopes[:, :, None, None] * _distance(extras, M, N, a, extras.slopes.device).abs()


def bucket_of(extras: Extras, M: int, N: int, a: Tensor | int | None) -> Tensor:
    """(M, N), or with a (B, 1, 1, 1) tensor `a` (B, M, N)."""
    assert extras.buckets is not None
    reach = extras.buckets.shape[0] // 2
    distance = _distance(extras, M, N, a, extras.buckets.device)
    distance = distance if distance.dim() == 2 else distance[:, 0]
    return extras.buckets[distance.clamp(-reach, reach) + reach].long()


def _distance(extras: Extras, M: int, N: int, a: Tensor | int | None, device: torch.device) -> Tensor:
    """j - i - a."""
    if not extras.bottom_right:
        a = 0
    elif a is None:
        a = N - M
    return torch.arange(N, device=device) - torch.arange(M, device=device)[:, None] - a


def check_dtype(x: Tensor, q: Tensor, name: str) -> None:
    """fp32 or q's dtype; under autocast q's is what it casts to, and models' parameters keep theirs."""
    if x.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name} must be {q.dtype}, as q, or fp32, got {x.dtype}")


def _buckets(bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """The bucket of each distance from -max_distance to max_distance, beyond which it does not change: int32."""
    key = bidirectional, num_buckets, max_distance, device
    if key in _BUCKETS and not torch.compiler.is_compiling():
        return _BUCKETS[key]
    with lasting():
        distance = torch.arange(-max_distance, max_distance + 1, device=device)
        count, first = num_buckets, torch.zeros_like(distance)
        if bidirectional:
            count //= 2
            first, distance = (distance > 0) * count, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
        grown = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        buckets = (first + torch.where(distance < exact, distance, grown)).to(torch.int32)
    if not torch.compiler.is_compiling() and may_keep([buckets]):
        _BUCKETS[key] = buckets
    return buckets


def _check_matrix(x: Any, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating point numbers, got {getattr(x, 'dtype', type(x).__name__)}")


def _check_align(align: str) -> None:
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}")


torch.export.register_dataclass(Bias)
