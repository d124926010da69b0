"""The cpu backend of gated activations: the specification, with its own draw of dropout."""

from __future__ import annotations

from torch import Tensor

from fastattn.dropout import FFN_HIDDEN
from fastattn.kernels.cpu.dropout import kept_elements
from fastattn.reference import drawn, gated, gated_backward


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def forward(z: Tensor, activation: str, seed: Tensor | None, dropout: float) -> Tensor:
    return gated(z, activation, drawn(kept_elements, seed, z, z.shape[-1] // 2, dropout, FFN_HIDDEN))


def backward(dhidden: Tensor, z: Tensor, activation: str, seed: Tensor | None, dropout: float) -> Tensor:
    return gated_backward(dhidden, z, activation, drawn(kept_elements, seed, z, z.shape[-1] // 2, dropout, FFN_HIDDEN))
