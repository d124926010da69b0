"""`Rotary`: which rotary position embedding an attention of `fastattn.nn` has."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.masks import may_keep
from fastattn.ops.rotary import rotary, rotary_tables
from fastattn.packing import Packing, lasting


@dataclass(frozen=True, eq=False)
class Rotary:
    """Queries and keys are turned by their place in the sequence: see `fastattn.rotary`.

    Args:
        base: of the angles place * base^(-2 f / dim).
        dim: how many features of a head are turned, the first ones; None: all.
        interleaved: pairs are neighbours, not features half of `dim` apart.

    >>> rotary = fastattn.nn.Rotary(base=160000.0)
    >>> mha, x = fastattn.nn.MultiHeadAttention(32, 4, batch_first=True, rotary=rotary), torch.randn(2, 7, 32)
    >>> mha(x, x, x, need_weights=False)[0].shape
    torch.Size([2, 7, 32])
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    _tables: dict = field(default_factory=dict, init=False, repr=False)  # the longest by features, dtype and device

    def turned(self, q: Tensor, k: Tensor, packing: Packing | None, backend: str) -> tuple[Tensor, Tensor]:
        """q and k (B, H, L, D), or with a packing (T, H, D), whose places are the columns of the padded batch."""
        length = q.shape[2] if packing is None else packing.max_length
        cos, sin = self._of(length, q.shape[-1], torch.float64 if q.dtype == torch.float64 else torch.float32, q.device)
        if packing is not None:
            cos, sin = (table.index_select(0, packing.positions) for table in (cos, sin))
        return rotary(q, k, cos, sin, interleaved=self.interleaved, backend=backend)

    def _of(self, length: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """cos and sin (length, R / 2)."""
        key, compiling = (features, dtype, device), torch.compiler.is_compiling()
        made = None if compiling else self._tables.get(key)
        if made is None or made[0].shape[0] < length:
            with lasting():
                places = torch.arange(length, device=device)
                made = rotary_tables(places, features if self.dim is None else self.dim, base=self.base, dtype=dtype)
            if not compiling and may_keep(made):
                self._tables[key] = made
        return tuple(table[:length] for table in made)
