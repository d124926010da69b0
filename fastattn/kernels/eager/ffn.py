"""The eager backend of `linear`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn.dropout import FFN_HIDDEN, kept_elements
from fastattn.reference import drawn, linear, linear_backward


def unsupported(problem) -> list[str]:
    return []


def forward(
    x, weight, bias, residual, activation: str | None, train: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    return linear(x, weight, bias, activation, residual, drawn(kept_elements, seed, x, weight.shape[0], dropout, FFN_HIDDEN))


def backward(
    dy, x, weight, z, activation: str | None, need_dx: bool, need_dw: bool, need_db: bool,
    before: tuple[Tensor, str] | None = None, seed: Tensor | None = None, dropout: float = 0.0,
):  # fmt: skip
    drop = drawn(kept_elements, seed if need_dx else None, x, x.shape[-1], dropout, FFN_HIDDEN)
    return linear_backward(dy, x, weight, z, activation, need_dx, need_dw, need_db, before, drop)
