"""The eager backend of `rotary`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference


def unsupported(problem) -> list[str]:
    return []


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    sin = -sin if inverse else sin
    q, k = (reference.rotary(x, cos, sin, interleaved) for x in (q, k))
    return q, k
