"""The eager backend of `add_layer_norm` and `add_rms_norm`: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference


def unsupported(problem) -> list[str]:
    return []


def forward(x, residual, weight, bias, eps: float, rms: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, the sum, mean and rstd; that a caller does not `keep` the sum saves nothing here."""
    return reference.norm(x, residual, weight, bias, eps, rms)


backward = reference.norm_backward
