"""A layer of an accelerated encoder in training on a GPU: one autograd Function, so that autograd sees one node for each layer.

Inside are the ops' plans and PyTorch's products. Query, key and value are one product forward and two backward, and so are their
gradients one matrix, of which each gets its part. A gradient that nobody asks for is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import planned
from fastattn.dropout import rescale
from fastattn.integrations.accelerate_layers import Batch
from fastattn.integrations.accelerate_parts import Family, Parts
from fastattn.integrations.accelerate_plans import Numbers, Weights, numbers_of, prepared_mask
from fastattn.lowering import NO_EXTRAS, Extras, Prepared, three
from fastattn.ops import attention, attention_plans, dispatch, ffn, norm
from fastattn.ops.attention_extras import extras_of

BACKEND = "auto"
WEIGHTS = 16


def trained(family: Family, parts: Parts, weights: Weights, x: Tensor, batch: Batch) -> Tensor | None:
    """A layer's output, of x's shape, recorded for a backward pass; None where it is not served here."""
    layout, numbers = weights.key(), numbers_of(family, parts)
    if layout is None or x.dtype != weights.tensors[0].dtype or x.dtype == torch.float64:
        return None
    mask = batch.scratch.get("mask")
    if mask is None:
        heads = weights.tensors[0].shape[0] // numbers.head_size
        mask = batch.scratch["mask"] = prepared_mask(x, heads, batch.packing, batch.mask)
    shape = x.shape if batch.packing is None else x.shape[1:]
    key = "trained layer", layout, numbers, shape, x.device, x.data_ptr() % 16, mask.key, planned.fp32_precision(x.dtype)
    plans: Any = planned.PLANS.get(key) or planned.keep(key, Plans())  # type: ignore[arg-type]
    return _record(x, mask, numbers, plans, *weights.tensors)


class Plans:
    """Of the forward of layers that differ in values alone, each made where it is first used."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def run(self, name: str, make: Callable, given: tuple, *rest: Any, **drawn: Any) -> Any:
        plan = self.made.get(name)
        if plan is None:
            plan = self.made[name] = make(*given, *rest, **drawn)
        return plan(*given, **drawn)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mask: Prepared, numbers: Numbers, plans: Plans, *weights: Tensor | None) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        saved = (_pre_norm if numbers.pre_norm else _post_norm)(rows, x.shape, mask, numbers, plans.run, weights)
        y, *kept = saved  # None where there is no such dropout
        ctx.save_for_backward(rows, *weights, *kept, *mask.tensors)
        ctx.mask, ctx.numbers, ctx.shape = mask, numbers, x.shape
        ctx.set_materialize_grads(False)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * (4 + WEIGHTS)
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of gradients is built, of which no more can be had
            return dispatch.FirstDerivative.apply(lambda *given: _gradients(ctx, needs, *given), dy, *tensors)
        return _gradients(ctx, needs, dy, *tensors)


_record = super(torch.autograd.Function, _Layer).apply  # less what transforms need, which do not come here


def _post_norm(x, shape, mask, n: Numbers, run: Callable, weights) -> tuple:
    """LN(x + attention(x)), then LN(y + ffn(y)): the output, and what the backward reads."""
    *attended, projected, bits = _attended(x, shape, mask, n, run, weights)
    up, b_up, down, b_down, w1, b1, w2, b2 = weights[8:]
    normal, *first = _norm_of_sum("first", projected, x, w1, b1, n.first_eps, n.first_dropout, run)
    y, hidden, z = run("ffn", ffn.plan_of, (normal, up, b_up, down, b_down), n.activation, True, BACKEND)
    y, *second = _norm_of_sum("second", y, normal, w2, b2, n.second_eps, n.second_dropout, run)
    return y, *attended, *first[:3], normal, hidden, z, *second[:3], bits, first[3], second[3]


def _pre_norm(x, shape, mask, n: Numbers, run: Callable, weights) -> tuple:
    """y = x + attention(LN(x)), then y + ffn(LN(y)); what the FFN adds is dropped by PyTorch, since no norm follows."""
    up, b_up, down, b_down, w1, b1, w2, b2 = weights[8:]
    normal1, _, mean1, rstd1 = run("first", norm.plan_of, (x, None, w1, b1), n.first_eps, False, True, BACKEND)
    *attended, projected, bits = _attended(normal1, shape, mask, n, run, weights)
    normal, total, *second, seed = _norm_of_sum("second", projected, x, w2, b2, n.second_eps, n.first_dropout, run)
    y, hidden, z = run("ffn", ffn.plan_of, (normal, up, b_up, down, b_down), n.activation, True, BACKEND)
    y, kept = torch.native_dropout(y, n.second_dropout, True) if n.second_dropout else (y, None)
    return y.add_(total), *attended, normal1, mean1, rstd1, normal, hidden, z, total, *second, bits, seed, kept


def _norm_of_sum(name: str, y: Tensor, x: Tensor, weight, bias, eps: float, dropout: float, run: Callable) -> tuple:
    """LN(x + dropout(y)), the sum, its statistics, and the seed, or None without dropout."""
    if not dropout:
        return *run(name, norm.plan_of, (y, x, weight, bias), eps, False, True, BACKEND), None
    seed = norm.seed_for(dropout, None, y.device)

    def make(y, x, weight, bias, _, seed, eps, rms, keep, backend):
        return norm.plan_of(y, x, weight, bias, eps, rms, keep, backend, seed, dropout)

    return *run(name, make, (y, x, weight, bias, None, seed), eps, False, True, BACKEND), seed


def _attended(x: Tensor, shape, mask: Prepared, n: Numbers, run: Callable, weights) -> tuple[Any, ...]:
    """Of x (rows, C): query, key and value as one matrix, what attention gives, as heads, its statistics, its projection, and the
    bits of the weights that are kept, or None without dropout."""
    weight, bias = _joined(weights)
    qkv = F.linear(x, weight, bias)
    q, k, v = three(qkv, _heads(shape, qkv, n))
    drawn, bits = {}, None
    if n.attention_dropout:
        extras = extras_of(None, n.attention_dropout, None, q, k, mask, BACKEND)
        drawn, bits = {"extras": extras}, extras.kept
    out, lse = run("attention", attention_plans.plan_of, (q, k, v, mask), n.scale, BACKEND, attention_plans.SAVED, **drawn)
    return qkv, out, lse, F.linear(_tokens(out), weights[6], weights[7]), bits


def _joined(weights) -> tuple[Tensor, Tensor | None]:
    query, query_bias, key, key_bias, value, value_bias = weights[:6]
    return torch.cat((query, key, value)), None if query_bias is None else torch.cat((query_bias, key_bias, value_bias))


def _heads(shape: tuple[int, ...], qkv: Tensor, n: Numbers) -> tuple[int, ...]:
    """(T, H, D), or (B, H, L, D)."""
    heads, lead = qkv.shape[1] // (3 * n.head_size), tuple(shape[:-1])
    return (*lead[:1], heads, *lead[1:], n.head_size)


def _tokens(out: Tensor) -> Tensor:
    """(T, H, D), or (B, H, L, D) in (B, L, H, D) memory, as (rows, H D)."""
    return out.flatten(1) if out.dim() == 3 else out.transpose(1, 2).flatten(0, 1).flatten(1)


def _gradients(ctx, needs, dy: Tensor, x: Tensor, *tensors: Tensor) -> tuple:
    weights, kept, n = tensors[:WEIGHTS], tensors[WEIGHTS:], ctx.numbers
    qkv, out, lse, total1, mean1, rstd1, normal, hidden, z, total2, mean2, rstd2, bits, drawn1, drawn2 = kept[:15]
    w1, w2, dy = weights[12], weights[14], dy.contiguous().view(x.shape)
    need, attended = [*needs[4:]], (qkv, out, lse, bits)
    up, inside = (True, *need[8:12]), (normal, *weights[8:12], hidden, z)
    if n.pre_norm:  # total1 is LN(x), which attention was given; the first dropout is before the second norm
        dffn = dy if drawn2 is None else torch.ops.aten.native_dropout_backward(dy, drawn2, rescale(n.second_dropout))
        dnormal, *ffn_grads = ffn.gradients((dffn, *inside), n.activation, up, BACKEND)
        dsum, dprojected, *norm2 = _norm_gradients((dnormal, dy, total2, mean2, rstd2, w2), need[14:], drawn1, n.first_dropout)
        dnormal, attention_grads = _attended_gradients(ctx, dprojected, total1, attended, weights, need, None)
        dx, _, *norm1 = _norm_gradients((dnormal, dsum, x, mean1, rstd1, w1), need[12:14], None, 0.0)
    else:
        dsum, dffn, *norm2 = _norm_gradients((dy, None, total2, mean2, rstd2, w2), need[14:], drawn2, n.second_dropout)
        dnormal, *ffn_grads = ffn.gradients((dffn, *inside), n.activation, up, BACKEND)
        first = dnormal.add_(dsum), None, total1, mean1, rstd1, w1
        dsum, dprojected, *norm1 = _norm_gradients(first, need[12:14], drawn1, n.first_dropout)
        dx, attention_grads = _attended_gradients(ctx, dprojected, x, attended, weights, need, dsum)
    grads = (*attention_grads, *ffn_grads, *norm1, *norm2)
    dtype = x.dtype  # of all weights; the sums of the norms and of the FFN's biases are fp32
    given = [g if g is None or g.dtype is dtype else g.to(dtype) for g in grads]
    return dx.view(ctx.shape), None, None, None, *(g if wanted else None for g, wanted in zip(given, need, strict=True))


def _norm_gradients(given: tuple, need: list, seed: Tensor | None, dropout: float) -> tuple:
    """Those of the sum, of what was dropped before it, of weight and bias."""
    if seed is None:
        dsum, dweight, dbias = norm.gradients(given, False, need[0], need[1], BACKEND)
        return dsum, dsum, dweight, dbias
    dsum, dweight, dbias, dropped = norm.gradients((*given, seed), False, need[0], need[1], BACKEND, dropout=dropout)
    return dsum, dropped, dweight, dbias


def _attended_gradients(ctx, d: Tensor, x: Tensor, attended, weights, need, plus: Tensor | None) -> tuple[Tensor, list]:
    """Of d, the gradient of what attention adds: that of x, with `plus` added, and those of the first eight weights."""
    (qkv, out, lse, bits), n = attended, ctx.numbers
    q, k, v = three(qkv, _heads(ctx.shape, qkv, n))
    dout = (d @ weights[6]).view(_tokens_shape(out))
    dout = dout if out.dim() == 3 else dout.transpose(1, 2)
    grads: list[Any] = [None] * 8
    if need[6]:
        grads[6] = d.mT @ _tokens(out)
    if need[7]:
        grads[7] = d.sum(0)
    extras = NO_EXTRAS if bits is None else Extras(kept=bits, dropout=n.attention_dropout)
    dqkv = attention.gradients(dout, None, q, k, v, out, lse, ctx.mask, n.scale, BACKEND, joined=True, extras=extras)
    if need[0] or need[2] or need[4]:
        grads[0:6:2] = (dqkv.mT @ x).chunk(3)
    if need[1] or need[3] or need[5]:
        grads[1:6:2] = dqkv.sum(0).chunk(3)
    weight = torch.cat((weights[0], weights[2], weights[4]))
    return dqkv @ weight if plus is None else torch.addmm(plus, dqkv, weight), grads


def _tokens_shape(out: Tensor) -> tuple[int, ...]:
    """(T, H, D), or (B, L, H, D): of memory as that of out."""
    return tuple(out.shape) if out.dim() == 3 else (out.shape[0], out.shape[2], out.shape[1], out.shape[3])
