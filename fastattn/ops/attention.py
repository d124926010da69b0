"""`attention`: problem, schema, fake, autograd, public function.

Calls go attention -> `direct` -> plan -> kernels/<backend>/attention.py, or where something watches, attention -> op (or autograd
Function around it) -> the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import masks
from fastattn.biases import Bias
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, Prepared, side_by_side
from fastattn.masks import Mask
from fastattn.ops import dispatch
from fastattn.ops.attention_extras import extras_of, kind_of
from fastattn.ops.attention_plans import (
    BACKENDS,
    DTYPES,
    EXACT,
    NO_MASK,
    SAVED,
    UNWANTED,
    as_one_sequence,
    backward_by_plan,
    backward_plan_of,
    forward_by_plan,
    forward_key,
    forward_plan,
    plan_of,
)  # fmt: skip
from fastattn.planned import (
    PLAIN,
    Known,
    fp32_precision,
    look_up,
    observed,
    plain,
    plain_types,
    recall,
    remember,
    watched,
)  # fmt: skip

# The op. `exact_lse` says that the caller wants lse itself; without it only the backward reads it, and a backend may save work.
# `bias_grad` asks for the gradient of the bias or the table; without it that is empty.

_TYPES = dict.fromkeys(("low", "high", "prefix_high", "max_queries", "max_keys"), "SymInt") | {"all_rows": "bool"}
_MASK = ", ".join(f"{_TYPES.get(name, 'Tensor')}? {name}" for name in LoweredMask._fields)
_TENSORS = tuple(name for name in LoweredMask._fields if name not in _TYPES)
_EXTRAS = "Tensor? bias, Tensor? table, Tensor? buckets, Tensor? slopes, bool bottom_right, Tensor? kept, float dropout"
_REQUEST = f"{_MASK}, {_EXTRAS}, float scale, str backend"
_FIELDS = len(LoweredMask._fields)


def _request(fields: Sequence) -> tuple[LoweredMask, Extras]:
    extras = Extras(*fields[_FIELDS:])
    return LoweredMask(*fields[:_FIELDS]), extras if extras.biased or extras.kept is not None else NO_EXTRAS


def _forward(q, k, v, *rest):
    *fields, scale, backend, exact_lse = rest
    mask, extras = _request(fields)
    return forward_by_plan(q, k, v, Prepared(mask), scale, backend, EXACT if exact_lse else SAVED, extras)


def _forward_fake(q, k, v, *rest):
    B, H, M, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, M, H, v.shape[3]).transpose(1, 2), q.new_empty(B, H, M, dtype=lse_dtype)


def forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)  # stays one node of the graph; this function runs again beneath it
    if dispatch.wants_autograd(*args[:3], *args[3 + _FIELDS : 5 + _FIELDS]):
        q, k, v, *fields, scale, backend, exact_lse = args
        mask, extras = _request(fields)
        return _Attention.apply(q, k, v, mask, scale, backend, exact_lse, None, extras, extras.learned)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _Attention(torch.autograd.Function):
    """q, k, v -> out, lse: by a plan, with a mask prepared for it, lse only where it is wanted; or by the ops.

    `learned` is the tensor of the extras that may get a gradient, which has to be an argument of its own.
    """

    @staticmethod
    def forward(
        ctx, q, k, v, mask: Prepared | LoweredMask, scale: float, backend: str, exact_lse: bool, plan, extras: Extras, learned
    ):
        ctx.set_materialize_grads(False)
        if isinstance(mask, Prepared):
            if extras is NO_EXTRAS:  # without a look at its properties
                out, lse = plan(q, k, v, mask)
                ctx.save_for_backward(q, k, v, out, lse, *mask.tensors)
                ctx.request = mask, scale, backend, extras
            else:
                out, lse = plan(q, k, v, mask, extras=extras)
                ctx.save_for_backward(q, k, v, out, lse, *extras.tensors, *mask.tensors)
                ctx.request = mask, scale, backend, extras.bare
            return (out, lse) if exact_lse else out
        with dispatch.below_autograd():
            out, lse = _FORWARD(q, k, v, *mask, *extras, scale, backend, exact_lse)
        ctx.save_for_backward(q, k, v, out, lse, *extras.tensors, *(getattr(mask, name) for name in _TENSORS))
        ctx.request = mask._replace(**dict.fromkeys(_TENSORS)), scale, backend, extras.bare
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        given, (mask, scale, backend, extras) = (dout, dlse, q, k, v, out, lse), ctx.request
        if extras is not NO_EXTRAS:
            tensors, extras = extras.filled(tensors)
        bias_grad = ctx.needs_input_grad[9]
        if not isinstance(mask, Prepared):
            fields = mask._replace(**dict(zip(_TENSORS, tensors, strict=True)))
            grads = dispatch.call_backward(_BACKWARD, *given, *fields, *extras, scale, backend, bias_grad)
        else:
            grads = gradients(*given, mask, scale, backend, extras=extras, bias_grad=bias_grad)
        return (*grads[:3], None, None, None, None, None, None, grads[3] if bias_grad else None)


def _backward(dout, dlse, q, k, v, out, lse, *rest):
    *fields, scale, backend, bias_grad = rest
    mask, extras = _request(fields)
    given = dout, dlse, q, k, v, out, lse
    grads = backward_by_plan(*given, Prepared(mask), scale, backend, extras, bias_grad)
    return (*grads[:3], grads[3].contiguous() if bias_grad else q.new_empty(0))


def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    *fields, _, _, bias_grad = rest
    learned = _request(fields)[1].learned if bias_grad else None
    dbias = q.new_empty(0) if learned is None else learned.new_empty(learned.shape)
    return (*(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)), dbias)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_REQUEST}, bool exact_lse) -> (Tensor, Tensor)",
    _forward, _forward_fake, forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_REQUEST}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Without the dispatcher

SCALES = (type(None), int, float)  # what a key may hold
_record = super(torch.autograd.Function, _Attention).apply  # less what transforms need, for which nothing may be direct


def gradients(
    dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool = False,
    extras: Extras = NO_EXTRAS, bias_grad: bool = False,
) -> Any:  # fmt: skip
    """dq, dk and dv by a plan, or, where something watches, by the op. joined: side by side, as one matrix (tokens, 3 H D).
    With `bias_grad` that of the bias or the table comes last."""
    given = dout, dlse, q, k, v, out, lse
    if not torch.is_grad_enabled() and not observed():
        name: tuple = "attention backward", mask.key, scale, backend, joined, dlse is None
        tensors: tuple = (dout, q, k, v, out, lse) if dlse is None else given
        added: tuple = ()
        if extras is not NO_EXTRAS:
            added = extras.tensors
            name = *name, tuple(x is not None for x in added), extras.bottom_right, extras.dropout, bias_grad
            tensors = *tensors, *(x for x in added if x is not None)
        found = recall(name, (), tensors)
        if found is None and not watched() and plain_types(*given, *added):
            found = backward_plan_of(*given, mask, scale, backend, joined, extras, bias_grad), False
            if not mask.packed:
                remember((name, (), tensors), found, fp32_precision(q.dtype))
        if found is not None:
            return found[0](*given, mask) if extras is NO_EXTRAS else found[0](*given, mask, extras)
    *grads, dbias = dispatch.call_backward(_BACKWARD, *as_one_sequence(*given), *mask.fields, *extras, scale, backend, bias_grad)
    last = (dbias,) if bias_grad else ()
    if joined:
        return (side_by_side(*grads), *last) if last else side_by_side(*grads)
    return (*(grads if q.dim() == 4 else (grad[0].transpose(0, 1) for grad in grads)), *last)


def direct(
    q,
    k,
    v,
    mask: Any,
    scale: float | None,
    backend: str,
    return_lse: bool,
    checked: bool = False,
    more: tuple[Any, Any, Any] | None = None,
    record: Callable | None = None,
) -> Any:
    """out, or (out, lse), without the dispatcher; nothing is `observed`. None where no such call was checked before and this one
    was not `checked` either, where a tensor is not plain, and where something watches. more: (bias, dropout, seed), if any.
    record: what is recorded for a backward pass, in the place of `_Attention`."""
    if mask is None:
        mask = NO_MASK
    elif type(mask) is not Prepared:
        if type(mask) is not Mask or type(q) not in PLAIN or type(k) not in PLAIN:
            return None
        mask = mask.prepared.get((q.shape, k.shape, q.device))
        if mask is None:
            return None
    if more is not None:
        return _direct_again(q, k, v, mask, *more, scale, backend, return_lse, record)
    name = "attention", mask.key, scale, backend, return_lse, torch.is_grad_enabled()
    given = q, k, v
    try:
        found = recall(name, (), given) or _looked_up(given, mask, name, checked)
    except (RuntimeError, TypeError):  # what has no memory or no strides, what no key can hold: the checks name it
        if checked:
            raise
        return None
    if found is None:
        return None
    plan, recorded = found
    if recorded:
        record = record or _record
        return record(q, k, v, mask, float(_scale(q, scale)), backend, return_lse, plan, NO_EXTRAS, None)
    result = plan(q, k, v, mask)
    return result if return_lse else result[0]


def _looked_up(given: tuple, mask: Prepared, name: tuple, checked: bool) -> Known | None:
    """The plan by the key of the call, and whether a gradient is wanted."""
    if watched() or any(x is None for x in given) or not plain(*given):
        return None
    (q, k, v), (_, _, scale, backend, return_lse, _) = given, name
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    lse = EXACT if return_lse else SAVED if recorded else UNWANTED
    key = forward_key(q, k, v, mask, scale, backend, lse)
    plan = look_up(key, lambda: forward_plan(q, k, v, mask, float(_scale(q, scale)), backend, lse), checked)
    if plan is None:
        return None
    remember((name, (), given), (plan, recorded), fp32_precision(given[0].dtype), tokens=3 if mask.packed else 0)
    return plan, recorded


def _direct_again(
    q, k, v, mask: Prepared, bias, dropout, seed, scale: float | None, backend: str, return_lse: bool, record: Callable | None
) -> Any:
    """`direct` for a call with extras. None where `direct_with` served none like it."""
    kind = kind_of(bias, mask.packed)
    if kind is None:
        return None
    name = _extended_name(mask, scale, backend, return_lse, kind[0], dropout)
    try:
        found = recall(name, (), (q, k, v, *kind[1]))
    except (RuntimeError, TypeError):  # as in `direct`
        return None
    if found is None:
        return None
    extras = extras_of(bias, dropout, seed, q, k, mask, backend, checked=True)
    return _extended(found, q, k, v, mask, extras, float(_scale(q, scale)), backend, return_lse, record or _record)


def direct_with(
    q, k, v, mask: Prepared, bias, extras: Extras, scale: float | None, backend: str, return_lse: bool,
    record: Callable | None = None,
) -> Any:  # fmt: skip
    """The same for a call that was checked and is plain, and for which its extras are made, while nothing watches."""
    number, given, found = float(_scale(q, scale)), (q, k, v, extras.learned), None
    kind = kind_of(bias, mask.packed)
    if kind is not None:
        name, tensors = _extended_name(mask, scale, backend, return_lse, kind[0], extras.dropout), (q, k, v, *kind[1])
        found = recall(name, (), tensors)  # it may be another mask or packing of a kind that is known
    if found is None:
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
        lse = EXACT if return_lse else SAVED if recorded else UNWANTED
        found = plan_of(q, k, v, mask, number, backend, lse, extras), recorded
        if kind is not None:
            remember((name, (), tensors), found, fp32_precision(q.dtype), tokens=3 if mask.packed else 0)
    return _extended(found, q, k, v, mask, extras, number, backend, return_lse, record or _record)


def _extended_name(mask: Prepared, *rest) -> tuple:
    return "attention and more", mask.key, torch.is_grad_enabled(), *rest


def _extended(
    found: Known, q, k, v, mask: Prepared, extras: Extras, scale: float, backend: str, return_lse: bool, record: Callable
) -> Any:
    plan, recorded = found
    if recorded:
        return record(q, k, v, mask, scale, backend, return_lse, plan, extras, extras.learned)
    result = plan(q, k, v, mask, extras=extras)
    return result if return_lse else result[0]


# The public function


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, bias: Tensor | Bias | None = None,
    scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None, return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, bias: Tensor | Bias | None = None,
    scale: float | None = None, dropout: float = 0.0, seed: int | Tensor | None = None, return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused multi-head attention, dropout(softmax(scale q k^T + bias + mask)) v, differentiable in q, k, v and bias.

    Args:
        q: (B, H, M, D), any strides; fp16, bf16, fp32, or fp64 (backends `eager` and `cpu`).
        k: (B, Hkv, N, D), v: (B, Hkv, N, Dv), q's dtype and device. H is a multiple of Hkv; query head h reads head
            h // (H / Hkv): grouped-query attention, and multi-query attention where Hkv = 1.
        mask: a `masks.Mask`, a bool tensor broadcastable to (B, H, M, N) with True = may attend, or None.
        bias: added to the scores: a tensor broadcastable to (B, H, M, N), in q's dtype or fp32, differentiable, in which -inf
            hides a pair; or `biases.relative` or `biases.alibi`. Of what is broadcast no copy is made, nor in the gradient.
        scale: any finite float; default D ** -0.5.
        dropout: the probability, 0 to 1, with which a weight becomes 0; the others are divided by 1 - dropout.
        seed: which weights those are (`fastattn.dropout_mask` says it): an int, or a one-element int64 tensor on q's device; None
            draws one from the device's default generator. Without dropout nothing is drawn.
        return_lse: also return the natural log-sum-exp of the masked scores, (B, H, M) in fp32 (fp64 for fp64 inputs);
            it is differentiable, and includes the bias and not dropout.
        backend: "auto", or one of "triton", "cuda", "cpu", "eager"; a named backend never falls back.

    Returns:
        out (B, H, M, Dv) in q's dtype, in (B, M, H, Dv) memory; or (out, lse). A query with no visible key has output 0,
        lse -inf and gradients 0. A key hidden from every query of its sequence by `padding` or `key_padding` may hold NaN.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: no backend, or not the named one, serves the request; its reasons are in the message.
        A second derivative and forward-mode differentiation raise too.

    The algorithm is the online softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135).

    >>> q, k, v = (torch.randn(2, 4, length, 16) for length in (5, 7, 7))
    >>> out, lse = fastattn.attention(q, k, v, fastattn.masks.padding([7, 3]), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 5, 16]), torch.Size([2, 4, 5]))
    """
    if not observed():
        more = None if bias is None and dropout == 0.0 and seed is None else (bias, dropout, seed)
        if (found := direct(q, k, v, mask, scale, backend, return_lse, False, more)) is not None:
            return found
    return first(q, k, v, mask, bias, scale, dropout, seed, return_lse, backend)


def first(q, k, v, mask, bias, scale, dropout, seed, return_lse: bool, backend: str, record: Callable | None = None) -> Any:
    """`attention` of a call that is checked. record: as of `direct`."""
    q, k, v, lowered, checked_scale = checked(q, k, v, mask, scale, backend)
    extras = extras_of(bias, dropout, seed, q, k, lowered, backend)
    if not observed() and not watched() and plain(q, k, v, *lowered.tensors, *extras.tensors) and isinstance(scale, SCALES):
        prepared = prepare(q, k, mask, lowered)
        if extras is NO_EXTRAS:
            return direct(q, k, v, prepared, scale, backend, return_lse, True, None, record)
        return direct_with(q, k, v, prepared, bias, extras, scale, backend, return_lse, record)
    out, lse = forward_autograd(q, k, v, *lowered, *extras, checked_scale, backend, return_lse)
    return (out, lse) if return_lse else out


def prepare(q, k, mask: Any, lowered: LoweredMask) -> Prepared:
    """A lowered mask for plans; a mask of ours keeps it for calls to come."""
    prepared = NO_MASK if mask is None else Prepared(lowered)
    if type(mask) is Mask:
        mask.keep_prepared((q.shape, k.shape, q.device), prepared)
    return prepared


def checked(q, k, v, mask, scale, backend) -> tuple[Tensor, Tensor, Tensor, LoweredMask, float]:
    """q, k, v, mask and scale from the public arguments: checked, cast for autocast, with defaults, the mask lowered if it is
    not."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        dispatch.check_tensor(x, name)
    dtype = dispatch.autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_tensors(q, k, v)
    dispatch.check_backend(backend, BACKENDS)
    B, H, M, _ = q.shape
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale}")
    if mask is None:
        mask = LoweredMask()
    elif not isinstance(mask, LoweredMask):
        mask = lower_mask(mask, B, H, M, k.shape[2], q.device)
    return q, k, v, mask, _scale(q, scale)


def _scale(q: Tensor, scale: float | None) -> float:
    return (q.shape[-1] or 1) ** -0.5 if scale is None else scale


def lower_mask(mask: Mask | Tensor, B: int, H: int, M: int, N: int, device: torch.device) -> LoweredMask:
    """What kernels receive of a mask or a bool tensor. Raises if it does not fit (B, H, M, N) or lies on another device."""
    mask = as_mask(mask)
    mask.check(B, H, M, N, device)
    return mask.lower(M, N, device)


def as_mask(mask: Mask | Tensor) -> Mask:
    if isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a masks.Mask, a bool tensor or None, got {type(mask).__name__}")
    return masks.dense(mask)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        q.dim() == 4
        and q.shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype in DTYPES
        and q.device == k.device == v.device
    ):
        return  # self-attention, the common case
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            shape = tuple(x.shape)
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head dimension), got shape {shape}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be fp16, bf16, fp32 or fp64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}: q, k and v share one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {x.shape[0]}, but q has {q.shape[0]}")
    if k.shape[2] != v.shape[2] or k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads of length {k.shape[2]}, but v has {v.shape[1]} of {v.shape[2]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head dimension {k.shape[3]}, but q has {q.shape[3]}")
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of k's {k.shape[1]}")
