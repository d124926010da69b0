"""The structured masks of `python -m benchmarks.ops --suite masks`: text and then an image, a window, documents.

Each is given as fastattn takes it and in every other form that a provider has for it, so that none is timed on a detour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import masks

DOCUMENTS = 10  # in each sequence


@dataclass(frozen=True)
class Layout:
    """`prefix` tokens of text, then an image of h x w tokens."""

    prefix: int
    h: int
    w: int

    @property
    def S(self) -> int:
        return self.prefix + self.h * self.w


FULL = Layout(256, 32, 32)
TINY = Layout(16, 8, 8)


@dataclass(frozen=True)
class MaskCase:
    """One mask: for fastattn, for FlexAttention, and for flash-attn where it has a form for it."""

    name: str
    mask: masks.Mask
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of b, h, i, j
    window: tuple[int, int] | None = None  # keys before and after the query's own
    lengths: Tensor | None = None  # (B, DOCUMENTS)


def cases(layout: Layout, B: int, device: torch.device) -> list[MaskCase]:
    h, w, prefix = layout.h, layout.w, layout.prefix
    reach = layout.S // 10
    return [
        MaskCase(f"rows({h}, {w}, {prefix})", masks.rows(h, w, prefix), _grid_mod(layout, 0, w)),
        MaskCase(f"columns({h}, {w}, {prefix})", masks.columns(h, w, prefix), _grid_mod(layout, h, 0)),
        MaskCase(f"conv({h}, {w}, 5, {prefix})", masks.conv(h, w, 5, prefix), _grid_mod(layout, 2, 2)),
        _window(reach, 0),
        _window(reach, reach),
        _documents(layout, B, device),
    ]


def _grid_mod(layout: Layout, row_reach: int, column_reach: int) -> Callable[..., Tensor]:
    prefix, w = layout.prefix, layout.w

    def mask_mod(b, h, i, j):
        row, column, key_row, key_column = (i - prefix) // w, (i - prefix) % w, (j - prefix) // w, (j - prefix) % w
        if row_reach == 0:
            near = row == key_row
        elif column_reach == 0:
            near = column == key_column
        else:
            near = ((row - key_row).abs() <= row_reach) & ((column - key_column).abs() <= column_reach)
        return (j <= i) & ((i < prefix) | (j < prefix) | near)

    return mask_mod


def _window(left: int, right: int) -> MaskCase:
    def mask_mod(b, h, i, j):
        return (i - j <= left) & (j - i <= right)

    return MaskCase(f"window({left}, {right})", masks.window(left, right), mask_mod, window=(left, right))


def _documents(layout: Layout, B: int, device: torch.device) -> MaskCase:
    """Cut at random places, which are others in each sequence."""
    S, generator = layout.S, torch.Generator().manual_seed(0)
    cuts = torch.stack([torch.randperm(S - 1, generator=generator)[: DOCUMENTS - 1].sort().values + 1 for _ in range(B)])
    ends = torch.cat([cuts.new_zeros(B, 1), cuts, cuts.new_full((B, 1), S)], 1)
    ids = (torch.arange(S) >= cuts[..., None]).sum(1).to(device)

    def mask_mod(b, h, i, j):
        return ids[b, i] == ids[b, j]

    return MaskCase(f"{DOCUMENTS} documents", masks.documents(ids), mask_mod, lengths=ends.diff(dim=1).to(device))
