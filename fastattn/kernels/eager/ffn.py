"""The eager backend of `linear`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference


def unsupported(problem) -> list[str]:
    return []


def forward(x, weight, bias, residual, activation: str | None, train: bool) -> tuple[Tensor, Tensor]:
    return reference.linear(x, weight, bias, activation, residual)


def backward(dy, x, weight, z, activation: str | None, need_dx: bool, need_dw: bool, need_db: bool):
    return reference.linear_backward(dy, x, weight, z, activation)
