"""The cpu backend of `add_layer_norm`: PyTorch's LayerNorm kernels, given fp32 parameters so that their statistics are fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference import compute_dtype


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def forward(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _wide(weight, total, 1.0), _wide(bias, total, 0.0)
    return torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)


def backward(dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight = _wide(weight, total, 1.0)
    return torch.ops.aten.native_layer_norm_backward(
        dy.to(total.dtype), total, total.shape[-1:], mean, rstd, weight, torch.zeros_like(weight), [True, True, True]
    )


def _wide(parameter: Tensor | None, total: Tensor, default: float) -> Tensor:
    dtype = compute_dtype(total.dtype)
    return torch.full(total.shape[-1:], default, dtype=dtype) if parameter is None else parameter.to(dtype)
