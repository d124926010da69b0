"""Terms: the parts of a mask that have no closed form in the kernels, and become one bit for each pair.

A class of terms is a frozen dataclass that is registered below and answers what `Term` lists; `masks.Mask.terms` are in
conjunction with each other and with the mask's bounds. Nothing else needs to know of it: bits, tiles, devices and checks go
through these methods, and kernels see bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastattn.packing import Packing


class Term(Protocol):
    """What a mask asks of its terms; a Mask answers the same questions."""

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        """The definition: bool, True = may attend, of four dimensions, (B or 1, H or 1, M or 1, N or 1), as small as it can be.

        Query i and key j count from 0. What depends on N - M takes it from M and N, or from `delta`, (B, 1, 1, 1), where that is
        given: in a packed batch it is another number for each sequence, M and N are the longest ones, and i and j are ranks.
        device is where a term that has no tensor makes its own. Runs under torch.compile and inside traces: no value is read.
        """

    def device(self) -> torch.device | None:
        """Where its tensors are; None if it has none."""

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None) -> None:
        """Raise ValueError, naming the argument, if it does not fit (B, H, M, N) or lies on another device than `device`.

        Runs in each call, so shapes alone are looked at. device None: any will do.
        """

    def __repr__(self) -> str:
        """The function of `fastattn.masks` that makes it; of a tensor its dtype and shape."""


def text(name: str, *arguments: Any) -> str:
    """A call of that function, for reading."""
    return f"{name}({', '.join(map(_argument, arguments))})"


def _argument(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


@dataclass(frozen=True, eq=False)
class Dense:
    """A term: a bool tensor of four dimensions, each 1 or that of (B, H, M, N)."""

    keep: Tensor

    def __repr__(self) -> str:
        return text("dense", self.keep)

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        return self.keep

    def device(self) -> torch.device:
        return self.keep.device

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None) -> None:
        for size, expected in zip(self.keep.shape, (B, H, M, N), strict=True):
            if size != 1 and size != expected:
                shape = tuple(self.keep.shape)
                keys = "; if it says which keys are real, pass masks.key_padding(mask), or mask[:, None, None, :]"
                hint = keys if shape == (1, 1, B, N) else ""
                raise ValueError(f"mask: a bool tensor of shape {shape} does not broadcast to {(B, H, M, N)}{hint}")
        if device is not None and self.keep.device != device:
            raise ValueError(f"mask is on {self.keep.device}, but q is on {device}; build the mask on q's device")


@dataclass(frozen=True, eq=False)
class Grid:
    """A term: `prefix` tokens of text, then an image of h x w tokens by rows, each of which sees earlier ones.

    Of the image a token sees those at most `row_reach` rows and `column_reach` columns away.
    """

    h: int
    w: int
    row_reach: int
    column_reach: int
    prefix: int

    def __repr__(self) -> str:
        if self.row_reach == self.column_reach:
            return text("conv", self.h, self.w, 2 * self.row_reach + 1, self.prefix)
        return text("rows" if self.row_reach == 0 else "columns", self.h, self.w, self.prefix)

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        x = torch.arange(M, device=device)[:, None] + (N - M if delta is None else delta)  # the query's place among the keys
        j = torch.arange(N, device=device)
        row, column, key_row, key_column = (
            part(y - self.prefix, self.w) for y in (x, j) for part in (torch.floor_divide, torch.remainder)
        )
        near = ((row - key_row).abs() <= self.row_reach) & ((column - key_column).abs() <= self.column_reach)
        pairs = (j <= x) & ((x < self.prefix) | (j < self.prefix) | near)
        return pairs[None, None] if delta is None else pairs

    def device(self) -> None:
        return None

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None) -> None:
        size = self.prefix + self.h * self.w
        if size < N:
            raise ValueError(f"mask: {N} keys, but a prefix of {self.prefix} and an image of {self.h} x {self.w} are {size}")


@dataclass(frozen=True, eq=False)
class AnyOf:
    """A term: visible where one of the masks says so."""

    parts: tuple[Any, ...]  # Masks

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        first, *others = (part.pairs(M, N, device, delta) for part in self.parts)
        for other in others:
            first = first | other
        return first

    def by_rank(self, packing: Packing, key_packing: Packing) -> AnyOf:
        """For packed sequences, of whose tokens the masks may hold ids, (T,): the same by rank."""
        return AnyOf(tuple(part._by_rank(packing, key_packing) for part in self.parts))

    def device(self) -> torch.device | None:
        return next((device for part in self.parts if (device := part.device()) is not None), None)

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None) -> None:
        for part in self.parts:
            part.check(B, H, M, N, device)


@dataclass(frozen=True, eq=False)
class Shifted:
    """A term: a mask whose sequence b has delta[b] more keys than queries; delta is (B, 1, 1, 1)."""

    mask: Any  # a Mask
    delta: Tensor

    def __repr__(self) -> str:
        return text("shifted", self.mask, self.delta)

    def pairs(self, M: int, N: int, device: torch.device | None, delta: Tensor | None = None) -> Tensor:
        return self.mask.pairs(M, N, device, self.delta)

    def device(self) -> torch.device:
        return self.delta.device

    def check(self, B: int, H: int, M: int, N: int, device: torch.device | None) -> None:
        self.mask.check(B, H, M, N, device)


for _class in (Dense, Grid, AnyOf, Shifted):
    torch.export.register_dataclass(_class)
