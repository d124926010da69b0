"""The eager backend of `add_layer_norm` and `add_rms_norm`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import reference
from fastattn.dropout import LAYER_NORM, RMS_NORM, kept_elements
from fastattn.reference import Drop


def unsupported(problem) -> list[str]:
    return []


def forward(
    x, residual, weight, bias, eps: float, rms: bool, keep: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, the sum, mean and rstd; that a caller does not `keep` the sum saves nothing here."""
    return reference.norm(x, residual, weight, bias, eps, rms, _drop(x, seed, dropout, rms))


def backward(
    dy, dtotal, total, mean, rstd, weight, need_dweight: bool, need_dbias: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Any, ...]:
    drop = _drop(total, seed, dropout, mean is None)
    return reference.norm_backward(dy, dtotal, total, mean, rstd, weight, need_dweight, need_dbias, drop)


def _drop(x: Tensor, seed: Tensor | None, p: float, rms: bool) -> Drop | None:
    if seed is None:
        return None
    return Drop(kept_elements(seed, x.shape[:-1].numel(), x.shape[-1], p, RMS_NORM if rms else LAYER_NORM), p)
