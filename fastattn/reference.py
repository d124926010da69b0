"""The executable specification: attention, linear and norms in plain PyTorch, for any device and dtype.

Half-precision inputs are computed in fp32 and rounded where a fused kernel rounds (P and dS before the second product, the
result once), so this is also the yardstick of the accuracy rule. B, H, M, N, D: batch, heads, queries, keys, head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.activations import ACTIVATIONS, GATED
from fastattn.biases import bias_of, bucket_of
from fastattn.dropout import rescale
from fastattn.lowering import LEAST_SCORE, NO_EXTRAS, Extras, LoweredMask, head_memory


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS, a: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """dropout(softmax(scale q k^T + bias + mask)) v, and the natural log-sum-exp of the scores, which dropout does not touch.

    q (B, H, M, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv); query head h reads head h // (H / Hkv) of k and v. Returns out
    (B, H, M, Dv) in q's dtype and lse (B, H, M) in fp32 (fp64 for fp64). A query with no visible key has out 0 and lse -inf.
    `a`: what a bias by distance subtracts from j - i, where it is not the mask's own: (B, 1, 1, 1).
    """
    s, visible = scores(q, k, mask, scale, extras, a)
    if s.shape[-1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), torch.full_like(s.sum(-1), float("-inf"))
    top = s.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    dead = total == 0
    total = torch.where(dead, 1, total)
    v = torch.where(visible.any(-2)[..., None], query_heads(v, q), 0)
    weights, factor = p, 1.0
    if extras.kept is not None:
        weights, factor = torch.where(kept_pairs(extras.kept, s.shape[-1]), p, 0), rescale(extras.dropout)
    out = (weights.to(q.dtype).to(p.dtype) @ v.to(p.dtype)) / total * factor
    lse = torch.where(dead, float("-inf"), top + torch.log(total))
    return out.to(q.dtype), lse[..., 0]


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: LoweredMask, scale: float,
    extras: Extras = NO_EXTRAS, a: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv of `attention`, and the gradient of extras' bias or table; dlse (B, H, M) or None is that of the log-sum-exp.

    With P = exp(S - lse), K what dropout keeps over 1 - p, and delta = rowsum(dO * O) - dlse: dV = (K * P)^T dO,
    dS = P * (K * dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, and a bias has dS, summed where it is broadcast; dK and dV
    are summed over the query heads that share a head of k and v.
    """
    s, visible = scores(q, k, mask, scale, extras, a)
    dead = lse == float("-inf")
    p = torch.exp(s - torch.where(dead, float("inf"), lse)[..., None])
    heads = k.shape[1]
    k, v = (torch.where(visible.any(-2)[..., None], query_heads(x, q), 0).to(p.dtype) for x in (k, v))
    q = torch.where(visible.any(-1)[..., None], q, 0).to(p.dtype)
    do = torch.where(dead[..., None], 0, dout).to(p.dtype)
    delta = (do * out.to(p.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - torch.where(dead, 0, dlse)
    weights, dp, factor = p, do @ v.mT, 1.0
    if extras.kept is not None:
        keep, factor = kept_pairs(extras.kept, p.shape[-1]), rescale(extras.dropout)
        weights, dp = torch.where(keep, p, 0), torch.where(keep, dp * factor, 0)
    dv = weights.to(dout.dtype).to(p.dtype).mT @ do * factor
    exact_ds = torch.where(visible, p * (dp - delta[..., None]), 0)
    ds = exact_ds.to(dout.dtype).to(p.dtype)
    dq, dk = (ds @ k) * scale, (ds.mT @ q) * scale
    if dk.shape[1] != heads:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    if extras.bias is not None and extras.bias.shape[3] == 1:  # softmax does not see it, the log-sum-exp does: delta cancels
        exact_ds = torch.zeros_like(lse)[..., None] if dlse is None else torch.where(dead, 0, dlse)[..., None]
    return dq.to(dout.dtype), dk.to(dout.dtype), dv.to(dout.dtype), bias_gradient(exact_ds, extras, a)


def scores(
    q: Tensor, k: Tensor, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS, a: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """scale q k^T + bias with -inf at hidden pairs, (B, H, M, N) in fp32 or fp64, and the bool tensor of visible pairs.

    A key hidden from every query and a query that sees no key are read as 0: NaN in them reaches nothing.
    """
    B, H, M, _ = q.shape
    visible = mask.visible(B, H, M, k.shape[2], q.device)
    k = torch.where(visible.any(-2)[..., None], query_heads(k, q), 0).to(compute_dtype(q.dtype))
    q = torch.where(visible.any(-1)[..., None], q, 0).to(k.dtype)
    s = q @ k.mT * scale
    if extras.biased:
        s = s + bias_of(extras, M, k.shape[2], a).to(s.dtype)
        visible = visible & ~(s < LEAST_SCORE)
    return torch.where(visible, s, float("-inf")), visible


def bias_gradient(ds: Tensor, extras: Extras, a: Tensor | int | None) -> Tensor | None:
    """Of extras' bias or table, in its dtype and shape, from dS (B, H, M, N); None without either."""
    if extras.bias is not None:
        return ds.sum_to_size(extras.bias.shape).to(extras.bias.dtype)
    if extras.table is None:
        return None
    bucket = bucket_of(extras, ds.shape[2], ds.shape[3], a)
    bucket = bucket if bucket.dim() == 2 else bucket[:, None]
    sums = [torch.where(bucket == x, ds, 0).sum((0, 2, 3)) for x in range(extras.table.shape[0])]
    return torch.stack(sums).to(extras.table.dtype)


def kept_pairs(kept: Tensor, N: int) -> Tensor:
    """The bits of `Extras.kept` as bool (..., N)."""
    return ((kept[..., None] >> torch.arange(32, dtype=torch.int32, device=kept.device)) & 1).bool().flatten(-2)[..., :N]


def query_heads(x: Tensor, q: Tensor) -> Tensor:
    """k or v (B, Hkv, N, D) with one head for each of q's: itself, or each head repeated."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


class Drop(NamedTuple):
    """Dropout of a tensor (..., d): rows are counted from its first."""

    kept: Tensor  # bool (rows, d)
    p: float


def drawn(draw: Callable, seed: Tensor | None, x: Tensor, columns: int, p: float, tag: int) -> Drop | None:
    """For as many rows as x (..., d) has, by a backend's own form of `dropout.kept_elements`; None without a seed."""
    return None if seed is None else Drop(draw(seed, x.shape[:-1].numel(), columns, p, tag), p)


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """The kept elements of x (..., d) divided by 1 - p, in place of the others 0."""
    return torch.where(drop.kept.view(x.shape), x, 0).mul_(rescale(drop.p))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, drop: Drop | None = None
) -> tuple[Tensor, Tensor]:
    """y = act(x W^T + b) + residual, and z = x W^T + b. x (..., K), weight (F, K), bias (F,), residual and results (..., F).

    With `drop` act(z) goes through dropout, whose elements are rounded once.
    """
    z = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return activated(z, activation, residual, drop), z


def activated(z: Tensor, activation: str | None, residual: Tensor | None, drop: Drop | None) -> Tensor:
    """act(z), what is kept of it, plus residual."""
    y = z if drop is None else z.to(compute_dtype(z.dtype))
    y = y if activation is None else ACTIVATIONS[activation][0](y)
    y = y if drop is None else dropped(y, drop).to(z.dtype)
    return y if residual is None else y + residual


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, activation: str | None,
    need_dx: bool = True, need_dw: bool = True, need_db: bool = True, before: tuple[Tensor, str] | None = None,
    drop: Drop | None = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """dx, dW and db of `linear`: dz = dy * act'(z), dx = dz W, dW = dz^T x, db = the sum of dz over rows; None if not needed.

    `before` = (z_before, activation_before) says that x is act_before(z_before): in place of dx comes the gradient of z_before,
    dx * act_before'(z_before), and last its sum over rows, the bias gradient of the layer before; else None. `drop` says that x
    is what dropout kept of act_before(z_before).
    """
    dz = dy
    if activation is not None:
        assert z is not None, "the derivative of an activation is taken at z"
        dz = ACTIVATIONS[activation][1](dy, z)
    rows = matrix(dz)
    dw = (rows.mT @ matrix(x)).to(weight.dtype) if need_dw else None
    db = rows.sum(0) if need_db else None  # PyTorch accumulates it in fp32 and rounds once
    dx = dz @ weight.to(dy.dtype) if need_dx else None
    if before is None or dx is None:
        return dx, dw, db, None
    z_before, activation_before = before
    if drop is None:
        dx = ACTIVATIONS[activation_before][1](dx, z_before)
    else:
        wide = compute_dtype(dx.dtype)
        dx = ACTIVATIONS[activation_before][1](dropped(dx.to(wide), drop), z_before.to(wide)).to(dx.dtype)
    return dx, dw, db, matrix(dx).sum(0)


def gated(z: Tensor, activation: str, drop: Drop | None = None) -> Tensor:
    """The hidden layer (..., F) of a gated ffn from z (..., 2 F): act(a) * b, a and b the halves of z; with `drop` what is kept
    of it. Computed in fp32 (fp64 for fp64) and rounded once."""
    a, b = halves(z.to(compute_dtype(z.dtype)))
    hidden = ACTIVATIONS[GATED[activation]][0](a) * b
    return (hidden if drop is None else dropped(hidden, drop)).to(z.dtype)


def gated_backward(dhidden: Tensor, z: Tensor, activation: str, drop: Drop | None = None) -> Tensor:
    """dz (..., 2 F) of `gated`: [dh * b * act'(a), dh * act(a)], with dh what dropout keeps of the hidden layer's gradient."""
    function, derivative = ACTIVATIONS[GATED[activation]]
    a, b = halves(z.to(compute_dtype(z.dtype)))
    dh = dhidden.to(a.dtype)
    dh = dh if drop is None else dropped(dh, drop)
    return torch.cat([derivative(dh * b, a), dh * function(a)], -1).to(z.dtype)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last dimension."""
    columns = x.shape[-1] // 2
    return x[..., :columns], x[..., columns:]


def matrix(x: Tensor) -> Tensor:
    """(..., d) as (rows, d); x.reshape(-1, d) has no answer for d = 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def residual_sum(x: Tensor, residual: Tensor | None, drop: Drop | None) -> Tensor:
    """residual + x, or residual + dropout(x), in the wider of their dtypes, rounded once."""
    if drop is None:
        return x if residual is None else residual + x
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    kept = dropped(x.to(compute_dtype(dtype)), drop)
    return (kept if residual is None else residual + kept).to(dtype)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    drop: Drop | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """LayerNorm, or RMSNorm, of residual + x over the last dimension: y in x's dtype, the sum, mean and rstd (..., 1).

    y = weight * (sum - mean) * rstd + bias with rstd = 1 / sqrt(mean((sum - mean)^2) + eps), all in fp32 or fp64; an RMSNorm
    subtracts no mean and returns None for it. With `drop` x goes through dropout before it is added.
    """
    total = residual_sum(x, residual, drop)
    centred, mean = total.to(compute_dtype(total.dtype)), None
    if not rms:
        mean = centred.mean(-1, keepdim=True)
        centred = centred - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype), total, mean, rstd


def norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    need_dweight: bool = True, need_dbias: bool = True, drop: Drop | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of `norm` for the sum, in its dtype, and for weight and bias, in rstd's; dtotal is the sum's own gradient.

    With `drop` a fourth one: x's, in its dtype, which dy has too; it is what is kept of the sum's.
    With n = (sum - mean) * rstd and g = dy * weight: dsum = rstd * (g - mean(g) - n * mean(g * n)) + dtotal, without mean(g) in
    an RMSNorm; dweight = the sum of dy * n over rows, dbias that of dy.
    """
    dtype, dy, wide = dy.dtype, dy.to(rstd.dtype), total.to(rstd.dtype)
    normal = (wide if mean is None else wide - mean) * rstd
    g = dy if weight is None else dy * weight.to(dy.dtype)
    dsum = g - normal * (g * normal).mean(-1, keepdim=True)
    dsum = rstd * (dsum if mean is None else dsum - g.mean(-1, keepdim=True))
    if dtotal is not None:
        dsum = dsum + dtotal
    rows = tuple(range(dy.dim() - 1))
    dweight = (dy * normal).sum(rows) if need_dweight else None
    grads = dsum.to(total.dtype), dweight, dy.sum(rows) if need_dbias else None
    return grads if drop is None else (*grads, dropped(dsum, drop).to(dtype))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, L, D) with cos and sin (L, R / 2) or (B or 1, L, R / 2), or x (T, H, D) with (T, R / 2): the first R features of
    each head, as pairs (a, b), become (a cos - b sin, b cos + a sin), rounded once; the others stay. In `head_memory`."""
    cos, sin = (table.to(compute_dtype(x.dtype)).unsqueeze(-3 if x.dim() == 4 else -2) for table in (cos, sin))
    R = 2 * cos.shape[-1]
    a, b = pairs(x[..., :R].to(cos.dtype), interleaved)
    turned = a * cos - b * sin, b * cos + a * sin
    first = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return head_memory(x).copy_(torch.cat([first.to(x.dtype), x[..., R:]], -1))


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second feature of each pair that `rotary` turns: neighbours, or the halves of x."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else halves(x)
