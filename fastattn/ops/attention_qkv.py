"""`attention_qkv`: self-attention of one tensor that holds q, k and v, which is read where it lies, and has one gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.lowering import NO_EXTRAS, Prepared
from fastattn.masks import Mask
from fastattn.ops import dispatch
from fastattn.ops.attention import SCALES, checked, direct, first, gradients, prepare
from fastattn.ops.attention_plans import NO_MASK, SAVED, UNWANTED, plan_with_qkv_bias
from fastattn.ops.varlen import checked_packing, known
from fastattn.ops.varlen import first as first_packed
from fastattn.packing import Packing
from fastattn.planned import fp32_precision, observed, plain, recall, remember, watched


class _Joined(torch.autograd.Function):
    """qkv -> out, lse by a plan of `attention`'s; its gradient is written once, in its own layout.

    The rest is as of `attention`'s own Function; `learned` is the tensor of the extras that may get a gradient.
    """

    @staticmethod
    def forward(ctx, qkv, mask, scale, backend, exact_lse, plan, extras, learned):
        ctx.set_materialize_grads(False)
        q, k, v = _parts(qkv)
        out, lse = plan(q, k, v, mask) if extras is NO_EXTRAS else plan(q, k, v, mask, extras=extras)
        ctx.save_for_backward(qkv, out, lse, *extras.tensors, *mask.tensors)
        ctx.request = mask, scale, backend, extras.bare
        return (out, lse) if exact_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        qkv, out, lse, *tensors = ctx.saved_tensors
        mask, scale, backend, extras = ctx.request
        if extras is not NO_EXTRAS:
            _, extras = extras.filled(tensors)
        dout = torch.zeros_like(out) if dout is None else dout
        q, k, v = _parts(qkv)
        bias_grad = ctx.needs_input_grad[7]
        grads = gradients(dout, dlse, q, k, v, out, lse, mask, scale, backend, True, extras, bias_grad)
        dqkv, dbias = grads if bias_grad else (grads, None)
        return dqkv.view(qkv.shape), None, None, None, None, None, None, dbias


class _Biased(torch.autograd.Function):
    """qkv, qkv_bias -> out by a plan that adds the bias as it goes. The backward makes q and v anew as they were multiplied;
    weights and the log-sum-exp are of k without its bias, which has the gradient 0."""

    @staticmethod
    def forward(ctx, qkv, qkv_bias, mask, scale, backend, plan):
        out, lse = plan(*_parts(qkv), mask, qkv_bias=qkv_bias)
        ctx.save_for_backward(qkv, qkv_bias, out, lse, *mask.tensors)
        ctx.request = mask, scale, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, qkv_bias, out, lse, *_ = ctx.saved_tensors
        q, k, v = _parts(qkv)
        at_q, _, at_v = (part if qkv.dim() == 4 else part[:, None] for part in qkv_bias.unbind(0))
        mask, scale, backend = ctx.request
        dqkv = gradients(dout, None, q + at_q, k, v + at_v, out, lse, mask, scale, backend, joined=True).view(qkv.shape)
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = dqkv.flatten(0, -4).sum(0)
            dbias[1] = 0
        return dqkv, dbias, None, None, None, None


_record = super(torch.autograd.Function, _Joined).apply  # less what transforms need, for which nothing is direct


def _record_joined(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, *request: Any) -> Any:
    return _record(qkv, *request)


def attention_qkv(
    qkv: Tensor, mask: Mask | Tensor | None = None, *, qkv_bias: Tensor | None = None, packing: Packing | None = None,
    bias: Tensor | Bias | None = None, scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None,
    return_lse: bool = False, backend: str = "auto",
) -> Any:  # fmt: skip
    """`attention` of each sequence over itself, for q, k and v that are one tensor, as one product of a linear gives them.

    Args:
        qkv: (B, L, 3, H, D), of any strides: queries, keys and values of H heads each; with a packing (T, 3, H, D). It is read
            in place, and its gradient is one tensor of its shape.
        mask: as for `attention`, with M = N = L.
        qkv_bias: (3, H, D) or as many in one dimension, added to qkv. On `triton` without a pass over qkv: q's is added as q is
            loaded, v's to the output, and k's, which adds one number to all scores of a query, is not read. With a bias of
            scores, dropout or a seed, with `return_lse`, under autocast, compiled, and on other backends it is a pass.
        packing: where the sequences lie, as for `varlen_attention`.
        bias, scale, dropout, seed, return_lse, backend: as for `attention`, or `varlen_attention`.

    Returns:
        out (B, L, H, D), contiguous, or with a packing (T, H, D); or (out, lse), lse (B, H, L) or (H, T).

    Raises:
        As `attention` does.

    >>> x, weight = torch.randn(2, 7, 32), torch.randn(96, 32)
    >>> qkv = fastattn.linear(x, weight).unflatten(-1, (3, 4, 8))
    >>> fastattn.attention_qkv(qkv, fastattn.masks.causal()).shape
    torch.Size([2, 7, 4, 8])
    """
    _check(qkv, packing)
    if qkv_bias is not None:
        qkv_bias = _shaped(qkv_bias, qkv)
        if bias is None and dropout == 0.0 and seed is None and not return_lse:
            found = _biased(qkv, qkv_bias, mask, packing, scale, backend)
            if found is not None:
                return found
        qkv = qkv + qkv_bias
    q, k, v = _parts(qkv)
    record, prepared = partial(_record_joined, qkv), mask if packing is None else known(q, k, v, packing, mask, None)
    found = None
    if not observed() and (packing is None or prepared is not None):
        more = None if bias is None and dropout == 0.0 and seed is None else (bias, dropout, seed)
        found = direct(q, k, v, prepared, scale, backend, return_lse, False, more, record)
    if found is None:
        request = bias, scale, dropout, seed, return_lse, backend, record
        found = first(q, k, v, mask, *request) if packing is None else first_packed(q, k, v, packing, mask, None, *request)
    if packing is not None:
        return found
    return (found[0].transpose(1, 2), found[1]) if return_lse else found.transpose(1, 2)


def _biased(qkv: Tensor, qkv_bias: Tensor, mask: Any, packing: Packing | None, scale: Any, backend: str) -> Tensor | None:
    """out by a backend that adds the bias itself; None where another one serves the call, and where something watches."""
    if not (backend == "triton" or (backend == "auto" and qkv.is_cuda)) or not isinstance(scale, SCALES):
        return None
    if observed() or watched() or not plain(qkv, qkv_bias):
        return None
    q, k, v = _parts(qkv)
    prepared: Prepared | None = NO_MASK
    if packing is not None:
        prepared = known(q, k, v, packing, mask, None)
    elif mask is not None:
        prepared = mask.prepared.get((q.shape, k.shape, q.device)) if type(mask) is Mask else None
    request, given = ("attention_qkv", scale, backend, torch.is_grad_enabled()), (qkv, qkv_bias)
    found = None if prepared is None else recall((*request, prepared.key), (), given)
    number = float(q.shape[-1] ** -0.5 if scale is None else scale) if q.shape[-1] else 1.0
    if found is None:
        if packing is not None:
            prepared = checked_packing(q, k, v, packing, mask, scale, backend)
        else:
            prepared = prepare(q, k, mask, checked(q, k, v, mask, scale, backend)[3])
        recorded = torch.is_grad_enabled() and (qkv.requires_grad or qkv_bias.requires_grad)
        found = plan_with_qkv_bias(q, k, v, prepared, number, backend, SAVED if recorded else UNWANTED, qkv_bias), recorded
        remember(((*request, prepared.key), (), given), found, fp32_precision(q.dtype), tokens=1 if packing is not None else 0)
    plan, recorded = found
    if plan is None:
        return None
    if recorded:
        out = _Biased.apply(qkv, qkv_bias, prepared, number, backend, plan)
    else:
        out, _ = plan(q, k, v, prepared, qkv_bias=qkv_bias)
    return out if packing is not None else out.transpose(1, 2)


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as `attention` takes them, (B, H, L, D), or packed (T, H, D): views."""
    if qkv.dim() == 4:
        return qkv.unbind(1)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _check(qkv: Any, packing: Any) -> None:
    dispatch.check_tensor(qkv, "qkv")
    layout = "(batch, length, 3, heads, head dimension)" if packing is None else "(rows, 3, heads, head dimension) of a packing"
    if qkv.dim() != (5 if packing is None else 4) or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must have the shape {layout}, got {tuple(qkv.shape)}")


def _shaped(qkv_bias: Any, qkv: Tensor) -> Tensor:
    """As (3, H, D), in qkv's dtype. Under autocast qkv may have another one."""
    dispatch.check_tensor(qkv_bias, "qkv_bias")
    shape = qkv.shape[-3:]
    if qkv_bias.shape != shape and tuple(qkv_bias.shape) != (shape.numel(),):
        raise ValueError(f"qkv_bias must have the shape {tuple(shape)} or {(shape.numel(),)}, got {tuple(qkv_bias.shape)}")
    if qkv_bias.device != qkv.device:
        raise ValueError(f"qkv_bias is on {qkv_bias.device}, but qkv is on {qkv.device}")
    if qkv_bias.dtype != qkv.dtype and dispatch.autocast_dtype(qkv) is None:
        raise TypeError(f"qkv_bias is {qkv_bias.dtype}, but qkv is {qkv.dtype}")
    return qkv_bias.reshape(shape).to(qkv.dtype).contiguous()
