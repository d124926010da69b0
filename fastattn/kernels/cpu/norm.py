"""The cpu backend of the norms: PyTorch's LayerNorm kernels, given fp32 parameters so that their statistics are fp32.

An RMSNorm, which PyTorch fuses on GPUs only, is the specification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dropout import LAYER_NORM, RMS_NORM
from fastattn.kernels.cpu.dropout import kept_elements


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, keep: bool,
    seed: Tensor | None = None, dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    drop = reference.drawn(kept_elements, seed, x, x.shape[-1], dropout, RMS_NORM if rms else LAYER_NORM)
    if rms:
        return reference.norm(x, residual, weight, bias, eps, rms, drop)
    total = reference.residual_sum(x, residual, drop)
    y, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], _wide(weight, total, 1.0), _wide(bias, total, 0.0), eps)
    return y.to(x.dtype), total, mean, rstd


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    need_dweight: bool, need_dbias: bool, seed: Tensor | None = None, dropout: float = 0.0,
) -> tuple[Any, ...]:  # fmt: skip
    drop = reference.drawn(kept_elements, seed, total, total.shape[-1], dropout, RMS_NORM if mean is None else LAYER_NORM)
    if mean is None:
        return reference.norm_backward(dy, dtotal, total, mean, rstd, weight, need_dweight, need_dbias, drop)
    weight = _wide(weight, total, 1.0)
    dtype = rstd.dtype  # in half precision PyTorch's kernel would add up dweight in it
    dsum, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), total.to(dtype), total.shape[-1:], mean, rstd, weight, torch.zeros_like(weight),
        [True, need_dweight, need_dbias],
    )  # fmt: skip
    dsum = dsum if dtotal is None else dsum + dtotal
    grads = dsum.to(total.dtype), dweight if need_dweight else None, dbias if need_dbias else None
    return grads if drop is None else (*grads, reference.dropped(dsum, drop).to(dy.dtype))


def _wide(parameter: Tensor | None, total: Tensor, default: float) -> Tensor:
    dtype = reference.compute_dtype(total.dtype)
    return torch.full(total.shape[-1:], default, dtype=dtype) if parameter is None else parameter.to(dtype)
