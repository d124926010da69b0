"""The eager backend: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import LoweredMask


def unsupported(problem) -> list[str]:
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(q, k, v, mask, scale)
    return _heads_inside(out), lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, scale)
    return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)


def _heads_inside(x: Tensor) -> Tensor:
    """(B, H, L, D) in (B, L, H, D) memory, the layout in which models go on."""
    B, H, L, D = x.shape
    return torch.empty(B, L, H, D, dtype=x.dtype, device=x.device).transpose(1, 2).copy_(x)
