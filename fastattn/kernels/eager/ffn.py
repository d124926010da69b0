"""The eager backend of `linear`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn.dropout import FFN_HIDDEN, kept_elements
from fastattn.reference import Drop, linear, linear_backward


def unsupported(problem) -> list[str]:
    return []


def forward(
    x, weight, bias, residual, activation: str | None, train: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    return linear(x, weight, bias, activation, residual, _drop(x, weight.shape[0], seed, dropout))


def backward(
    dy, x, weight, z, activation: str | None, need_dx: bool, need_dw: bool, need_db: bool,
    before: tuple[Tensor, str] | None = None, seed: Tensor | None = None, dropout: float = 0.0,
):  # fmt: skip
    drop = _drop(x, x.shape[-1], seed if need_dx else None, dropout)
    return linear_backward(dy, x, weight, z, activation, need_dx, need_dw, need_db, before, drop)


def _drop(x: Tensor, columns: int, seed: Tensor | None, p: float) -> Drop | None:
    return None if seed is None else Drop(kept_elements(seed, x.shape[:-1].numel(), columns, p, FFN_HIDDEN), p)
