"""The eager backend of `linear`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn.reference import linear, linear_backward


def unsupported(problem) -> list[str]:
    return []


def forward(x, weight, bias, residual, activation: str | None, train: bool) -> tuple[Tensor, Tensor]:
    return linear(x, weight, bias, activation, residual)


backward = linear_backward
