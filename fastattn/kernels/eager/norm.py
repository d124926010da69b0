"""The eager backend of `add_layer_norm` and `add_rms_norm`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import reference
from fastattn.dropout import LAYER_NORM, RMS_NORM, kept_elements


def unsupported(problem) -> list[str]:
    return []


def forward(
    x, residual, weight, bias, eps: float, rms: bool, keep: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, the sum, mean and rstd; that a caller does not `keep` the sum saves nothing here."""
    drop = reference.drawn(kept_elements, seed, x, x.shape[-1], dropout, RMS_NORM if rms else LAYER_NORM)
    return reference.norm(x, residual, weight, bias, eps, rms, drop)


def backward(
    dy, dtotal, total, mean, rstd, weight, need_dweight: bool, need_dbias: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Any, ...]:
    drop = reference.drawn(kept_elements, seed, total, total.shape[-1], dropout, RMS_NORM if mean is None else LAYER_NORM)
    return reference.norm_backward(dy, dtotal, total, mean, rstd, weight, need_dweight, need_dbias, drop)
