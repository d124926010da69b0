"""What stands between the two linears of a gated `ffn`: problem, choice of a backend, plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops import dispatch

BACKENDS = ("triton", "cuda", "cpu", "eager")  # in order of preference, as of `linear`


@dataclass(frozen=True)
class GatedProblem:
    """One request, from metadata alone."""

    device: str
    dtype: torch.dtype
    columns: int  # of the hidden layer
    activation: str

    def __str__(self) -> str:
        return f"{self.activation}(F={self.columns}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


def module_of(x: Tensor, columns: int, activation: str, backend: str):
    return dispatch.choose("gated", BACKENDS, backend, GatedProblem(x.device.type, x.dtype, columns, activation))


def plan(z: Tensor, activation: str, backend: str, seed: Tensor | None, dropout: float):
    """(z (..., 2 F), seed) -> what `fastattn.reference.gated` gives; there is a seed if and only if dropout > 0."""
    module = module_of(z, z.shape[-1] // 2, activation, backend)
    if hasattr(module, "forward_plan"):
        return module.forward_plan(z, activation, seed, dropout)
    return lambda z, seed: module.forward(z, activation, seed, dropout)


def backward_plan(dhidden: Tensor, z: Tensor, activation: str, backend: str, seed: Tensor | None, dropout: float):
    """(dhidden (..., F), z, seed) -> what `fastattn.reference.gated_backward` gives."""
    module = module_of(z, z.shape[-1] // 2, activation, backend)
    if hasattr(module, "backward_plan"):
        return module.backward_plan(dhidden, z, activation, seed, dropout)
    return lambda dhidden, z, seed: module.backward(dhidden, z, activation, seed, dropout)
