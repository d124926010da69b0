"""The executable specification: attention, linear and norms in plain PyTorch, for any device and dtype.

Half-precision inputs are computed in fp32 and rounded where a fused kernel rounds (P and dS before the second product, the
result once), so this is also the yardstick of the accuracy rule. B, H, M, N, D: batch, heads, queries, keys, head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.activations import ACTIVATIONS
from fastattn.masks import LoweredMask


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v and its natural log-sum-exp.

    q (B, H, M, D), k and v (B, H, N, D); returns out (B, H, M, D) in q's dtype and lse (B, H, M) in fp32 (fp64 for fp64).
    A query with no visible key has out 0 and lse -inf.
    """
    s, visible = scores(q, k, mask, scale)
    if s.shape[-1] == 0:
        return torch.zeros_like(q), torch.full_like(s.sum(-1), float("-inf"))
    top = s.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    dead = total == 0
    total = torch.where(dead, 1, total)
    v = torch.where(visible.any(-2)[..., None], v, 0)
    out = (p.to(q.dtype).to(p.dtype) @ v.to(p.dtype)) / total
    lse = torch.where(dead, float("-inf"), top + torch.log(total))
    return out.to(q.dtype), lse[..., 0]


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: LoweredMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention`; dlse (B, H, M) or None is the gradient of the log-sum-exp.

    With P = exp(S - lse), delta = rowsum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K,
    dK = scale dS^T Q.
    """
    s, visible = scores(q, k, mask, scale)
    dead = lse == float("-inf")
    p = torch.exp(s - torch.where(dead, float("inf"), lse)[..., None])
    q = torch.where(visible.any(-1)[..., None], q, 0).to(p.dtype)
    k, v = (torch.where(visible.any(-2)[..., None], x, 0).to(p.dtype) for x in (k, v))
    do = torch.where(dead[..., None], 0, dout).to(p.dtype)
    delta = (do * out.to(p.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - torch.where(dead, 0, dlse)
    dv = p.to(dout.dtype).to(p.dtype).mT @ do
    ds = torch.where(visible, p * (do @ v.mT - delta[..., None]), 0).to(dout.dtype).to(p.dtype)
    dq, dk = (ds @ k) * scale, (ds.mT @ q) * scale
    return dq.to(dout.dtype), dk.to(dout.dtype), dv.to(dout.dtype)


def scores(q: Tensor, k: Tensor, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    """scale q k^T with -inf at hidden pairs, (B, H, M, N) in fp32 or fp64, and the bool tensor of visible pairs.

    A key hidden from every query and a query that sees no key are read as 0: NaN in them reaches nothing.
    """
    B, H, M, _ = q.shape
    visible = mask.visible(B, H, M, k.shape[2], q.device)
    q = torch.where(visible.any(-1)[..., None], q, 0).to(compute_dtype(q.dtype))
    k = torch.where(visible.any(-2)[..., None], k, 0).to(q.dtype)
    return torch.where(visible, q @ k.mT * scale, float("-inf")), visible


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = act(x W^T + b) + residual, and z = x W^T + b. x (..., K), weight (F, K), bias (F,), residual and results (..., F)."""
    z = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = z if activation is None else ACTIVATIONS[activation][0](z)
    return (y if residual is None else y + residual), z


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, activation: str | None,
    need_dx: bool = True, need_dw: bool = True, need_db: bool = True,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """dx, dW and db of `linear`: dz = dy * act'(z), dx = dz W, dW = dz^T x, db = the sum of dz over rows; None if not needed."""
    dz = dy
    if activation is not None and z is not None:
        dz = ACTIVATIONS[activation][1](dy, z)
    rows = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight.to(dy.dtype) if need_dx else None
    dw = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if need_dw else None
    db = rows.sum(0) if need_db else None  # PyTorch accumulates it in fp32 and rounds once
    return dx, dw, db


def layer_norm(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """weight * (total - mean) * rstd + bias over the last dimension, with mean and rstd (..., 1), all in fp32 or fp64."""
    total = total.to(compute_dtype(total.dtype))
    mean = total.mean(-1, keepdim=True)
    rstd = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + eps)
    y = (total - mean) * rstd
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)), mean, rstd


def layer_norm_backward(
    dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` for total, weight and bias, in fp32 or fp64."""
    dy, total = dy.to(mean.dtype), total.to(mean.dtype)
    normal = (total - mean) * rstd
    g = dy if weight is None else dy * weight.to(dy.dtype)
    dtotal = rstd * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    rows = tuple(range(dy.dim() - 1))
    return dtotal, (dy * normal).sum(rows), dy.sum(rows)
