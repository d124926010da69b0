"""The eager backend of gated activations: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn.dropout import FFN_HIDDEN, kept_elements
from fastattn.reference import drawn, gated, gated_backward


def unsupported(problem) -> list[str]:
    return []


def forward(z: Tensor, activation: str, seed: Tensor | None, dropout: float) -> Tensor:
    return gated(z, activation, drawn(kept_elements, seed, z, z.shape[-1] // 2, dropout, FFN_HIDDEN))


def backward(dhidden: Tensor, z: Tensor, activation: str, seed: Tensor | None, dropout: float) -> Tensor:
    return gated_backward(dhidden, z, activation, drawn(kept_elements, seed, z, z.shape[-1] // 2, dropout, FFN_HIDDEN))
