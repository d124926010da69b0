"""`ffn`, two linears with an activation between: schema, fake, autograd, plans, public function.

An op of its own for its backward: the gradient of the hidden layer is multiplied by act'(z) where it is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import planned
from fastattn.ops import dispatch
from fastattn.ops.linear import (
    BACKENDS,
    LinearProblem,
    backward_plan_of_module,
    check_layer,
    checked_input,
    given,
    given_fake,
    plan_of_module,
    problem_of,
)
from fastattn.planned import (
    PLANS,
    Known,
    Request,
    fp32_precision,
    layout,
    observed,
    plain,
    recall,
    remember,
    unaligned,
    watched,
    without_memory,
)

# ffn: y = h W2^T + b2 with h = act(z), z = x W1^T + b1; h and z are returned, else empty, where `train` says so.


def _forward(x, w1, b1, w2, b2, activation, train, backend):
    y, hidden, z = forward_by_plan(x, w1, b1, w2, b2, activation, train, backend)
    return y, (hidden if train else x.new_empty(0)), (z if train else x.new_empty(0))


def _forward_fake(x, w1, b1, w2, b2, activation, train, backend):
    hidden = x.new_empty((*x.shape[:-1], w1.shape[0]) if train else 0)
    return x.new_empty(*x.shape[:-1], w2.shape[0]), hidden, x.new_empty(hidden.shape)


def _forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)
    if dispatch.wants_autograd(*args[:5]):
        return _FeedForward.apply(*args)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _FeedForward(torch.autograd.Function):
    """By a plan, or by the ops, whose three outputs are all there then."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, activation, train, backend, plan=None):
        ctx.request = activation, backend, plan is not None
        ctx.set_materialize_grads(False)
        if plan is not None:
            y, hidden, z = plan(x, w1, b1, w2, b2)
            ctx.save_for_backward(x, w1, b1, w2, b2, hidden, z)
            return y
        with dispatch.below_autograd():
            y, hidden, z = _FORWARD(x, w1, b1, w2, b2, activation, train, backend)
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden, z)
        ctx.mark_non_differentiable(hidden, z)
        return y, hidden, z

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        needs, given, (activation, backend, direct) = ctx.needs_input_grad[:5], (dy, *ctx.saved_tensors), ctx.request
        return (*gradients(given, activation, needs, backend, direct), None, None, None, None)


def gradients(given: tuple, activation: str, needs: tuple, backend: str, direct: bool = True) -> Any:
    """Of dy, x, w1, b1, w2, b2, hidden and z: the gradients of x, w1, b1, w2 and b2, None where not needed. By a plan, or
    where something watches, or where they are not `direct` results of one, by the op."""
    plan = _backward_plan(given, activation, needs, backend, False) if direct and not torch.is_grad_enabled() else None
    if plan is not None:
        return plan(*given)
    grads = dispatch.call_backward(_BACKWARD, *given, activation, list(needs), backend)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _backward(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend):
    if z.numel() != x.shape[:-1].numel() * w1.shape[0]:  # a graph exported for inference that is trained after all
        _, hidden, z = forward_by_plan(x, w1, b1, w2, b2, activation, True, backend)
    given = dy, x, w1, b1, w2, b2, hidden, z
    grads = _backward_plan(given, activation, tuple(needs), backend, True)(*given)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend):
    tensors = zip((x, w1, b1, w2, b2), needs, strict=True)
    return tuple(given_fake(x if like is None else like, need and like is not None) for like, need in tensors)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "ffn_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool train, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "ffn_backward(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor hidden, Tensor z, str activation,"
    " bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans, for any number of rows

_record = super(torch.autograd.Function, _FeedForward).apply  # less what transforms need, for which nothing may be direct


def forward_by_plan(x, w1, b1, w2, b2, activation, train, backend):
    return plan_of(x, w1, b1, w2, b2, activation, train, backend)(x, w1, b1, w2, b2)


def plan_of(x, w1, b1, w2, b2, activation, train, backend):
    """(x, w1, b1, w2, b2) -> y, hidden, z."""
    key = "op", _forward_key(x, w1, b1, w2, b2, activation, train, backend)  # whose tensors nobody checked
    return PLANS.get(key) or planned.keep(key, _forward_plan(x, w1, b1, w2, b2, activation, train, backend))


def _forward_key(x, w1, b1, w2, b2, activation, train, backend) -> tuple:
    given = x, w1, b1, w2, b2
    return (
        "ffn", *map(layout, given), w1.shape, w2.shape, activation, train, backend, x.device, unaligned(*given),
        without_memory(*given), fp32_precision(x.dtype),
    )  # fmt: skip


def _module(x, w1, w2, activation, backend):
    hidden = LinearProblem(x.device.type, x.dtype, x.shape[:-1].numel(), w1.shape[0], w2.shape[0], None)
    return dispatch.choose("ffn", BACKENDS, backend, problem_of(x, w1, activation), hidden)


def _forward_plan(x, w1, b1, w2, b2, activation, train, backend):
    module = _module(x, w1, w2, activation, backend)
    hidden = x.new_empty((*x.shape[:-1], w1.shape[0]))
    up = plan_of_module(module, x, w1, b1, None, activation, train)
    down = plan_of_module(module, hidden, w2, b2, None, None, train)

    def call(x, w1, b1, w2, b2):
        hidden, z = up(x, w1, b1, None)
        return down(hidden, w2, b2, None)[0], hidden, z

    return call


def _backward_plan(tensors, activation, needs, backend, in_op: bool):
    """Outside of the op None where something watches, or a tensor is not plain."""
    dy, x, w1, b1, w2, b2, hidden, z = tensors
    rows = dy, x, hidden, z
    name = "ffn backward", activation, needs, backend, b1 is None, b2 is None
    request = name, rows, (*rows, w1, w2, *(b for b in (b1, b2) if b is not None))
    found = None if observed() else recall(*request)
    if found is not None:
        return found[0]
    if not in_op and (watched() or not plain(*tensors)):
        return None
    key = (
        "ffn backward",
        *map(layout, tensors),
        activation,
        *needs,
        backend,
        x.device,
        unaligned(*tensors),
        fp32_precision(x.dtype),
    )
    plan = PLANS.get(key) or planned.keep(key, _make_backward_plan(tensors, activation, needs, backend))
    remember(request, (plan, False), fp32_precision(x.dtype))
    return plan


def _make_backward_plan(tensors, activation, needs, backend):
    dy, x, w1, b1, w2, b2, hidden, z = tensors
    module = _module(x, w1, w2, activation, backend)
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    need_db1, need_db2 = need_db1 and b1 is not None, need_db2 and b2 is not None
    need_dz, through = need_dx or need_dw1 or need_db1, need_dx or need_dw1
    flags = need_dz, need_dw2, need_db2
    down = backward_plan_of_module(module, dy, hidden, w2, None, None, *flags, before=(z, activation))
    dz = x.new_empty(z.shape)
    up = backward_plan_of_module(module, dz, x, w1, None, None, need_dx, need_dw1, False) if through else None

    def call(dy, x, w1, b1, w2, b2, hidden, z):
        dz, dw2, db2, db1 = down(dy, hidden, w2, None, z)
        dx, dw1, _, _ = (None,) * 4 if up is None else up(dz, x, w1, None, None)
        db1 = given(db1, b1) if need_db1 else None
        return given(dx, x), given(dw1, w1), db1, given(dw2, w2), given(db2, x if b2 is None else b2)

    return call


def _request(x, w1, b1, w2, b2, activation, backend) -> Request:
    name = "ffn", activation, backend, b1 is None, b2 is None, torch.is_grad_enabled()
    first = (x, w1, w2) if b1 is None else (x, w1, w2, b1)
    return name, (x,), first if b2 is None else (*first, b2)


def _look_up(x, w1, b1, w2, b2, activation, backend, checked: bool) -> Known | None:
    """The plan by the key of the call, for any layout; nothing watches. None where no such call was checked before and this one
    was not either, and where a tensor is not plain."""
    given = x, w1, b1, w2, b2
    if x is None or w1 is None or w2 is None or not plain(*given):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    key = _forward_key(*given, activation, recorded, backend)
    plan = planned.look_up(key, lambda: _forward_plan(*given, activation, recorded, backend), checked)
    if plan is None:
        return None
    remember(_request(*given, activation, backend), (plan, recorded), fp32_precision(x.dtype))
    return plan, recorded


# The public function


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """act(x W1^T + b1) W2^T + b2: the feed-forward block of a transformer layer, differentiable in every tensor.

    x (..., K), w1 (F, K), b1 (F,), w2 (K', F), b2 (K',); the result is (..., K'). dtypes, activations and errors are those of
    `linear`. dropout, seed and recompute are not served yet; anything but the default raises NotImplementedError.
    """
    default = dropout == 0.0 and seed is None and recompute is False
    found = recall(*_request(x, w1, b1, w2, b2, activation, backend)) if default and not observed() else None
    if found is None:
        quiet = default and not watched()
        found = _look_up(x, w1, b1, w2, b2, activation, backend, False) if quiet else None
    if found is None:
        x = _ffn_input(x, w1, b1, w2, b2, activation, dropout, seed, recompute, backend)
        if not quiet or not plain(x, w1, b1, w2, b2):
            train = dispatch.wants_autograd(x, w1, b1, w2, b2)
            return _forward_autograd(x, w1, b1, w2, b2, activation, train, backend)[0]
        found = _look_up(x, w1, b1, w2, b2, activation, backend, True)
        assert found is not None
    plan, recorded = found
    if recorded:
        return _record(x, w1, b1, w2, b2, activation, True, backend, plan)
    return plan(x, w1, b1, w2, b2)[0]


def _ffn_input(x, w1, b1, w2, b2, activation, dropout, seed, recompute, backend) -> Tensor:
    """x, cast for autocast, once all arguments of `ffn` have been checked."""
    for name, value, default in (("dropout", dropout, 0.0), ("seed", seed, None), ("recompute", recompute, False)):
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not served yet: leave it at {default}")
    if activation is None:
        raise ValueError("activation must be a name: without one, ffn would be a single linear map")
    x, autocast = checked_input(x, activation, backend)
    check_layer(x, x.shape[-1], {"w1": w1, "b1": b1}, autocast)
    check_layer(x, w1.shape[0], {"w2": w2, "b2": b2}, autocast)
    return x
