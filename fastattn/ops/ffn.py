"""`ffn`, two linears with an activation between: schema, fake, autograd, plans, public function.

An op of its own for its backward: the gradient of the hidden layer is multiplied by act'(z) where it is made. A gated activation,
which gives half as many columns as it takes, is computed between the two products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import planned
from fastattn.activations import GATED
from fastattn.dropout import seed_for
from fastattn.ops import dispatch, gated
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

# ffn: y = h W2^T + b2 with h = dropout(act(z)), of a gated activation dropout(act(a) * b) with [a, b] = z, and z = x W1^T + b1.
# h and z are returned where `train` says so and `recompute` does not say that the backward is to make them again, else empty.
# There is a seed if and only if dropout > 0.


def _forward(x, w1, b1, w2, b2, activation, train, backend, seed=None, dropout=0.0, recompute=False):
    y, hidden, z = forward_by_plan(x, w1, b1, w2, b2, activation, train, backend, seed, dropout)
    return (y, hidden, z) if train and not recompute else (y, x.new_empty(0), x.new_empty(0))


def _forward_fake(x, w1, b1, w2, b2, activation, train, backend, seed=None, dropout=0.0, recompute=False):
    kept = train and not recompute
    hidden, z = (x.new_empty((*x.shape[:-1], width) if kept else 0) for width in (w2.shape[1], w1.shape[0]))
    return x.new_empty(*x.shape[:-1], w2.shape[0]), hidden, z


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
    def forward(ctx, x, w1, b1, w2, b2, activation, train, backend, seed=None, dropout=0.0, recompute=False, plan=None):
        ctx.request = activation, backend, plan is not None, dropout
        ctx.set_materialize_grads(False)
        if plan is not None:
            y, hidden, z = plan(x, w1, b1, w2, b2, seed)
            ctx.save_for_backward(x, w1, b1, w2, b2, hidden, z, seed)
            return y
        with dispatch.below_autograd():
            y, hidden, z = _FORWARD(x, w1, b1, w2, b2, activation, train, backend, seed, dropout, recompute)
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden, z, seed)
        ctx.mark_non_differentiable(hidden, z)
        return y, hidden, z

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 12
        needs, given, (activation, backend, direct, dropout) = ctx.needs_input_grad[:5], (dy, *ctx.saved_tensors), ctx.request
        return (*gradients(given, activation, needs, backend, direct, dropout), None, None, None, None, None, None, None)


def gradients(given: tuple, activation: str, needs: tuple, backend: str, direct: bool = True, dropout: float = 0.0) -> Any:
    """Of dy, x, w1, b1, w2, b2, hidden, z and, with dropout, the seed: the gradients of x, w1, b1, w2 and b2, None where not
    needed. By a plan, or where something watches, or where they are not `direct` results of one, by the op."""
    plan = None
    if direct and not torch.is_grad_enabled():
        plan = _backward_plan(given, activation, needs, backend, False, dropout)
    if plan is not None:
        return plan(*given)
    seed = given[8] if dropout else None
    grads = dispatch.call_backward(_BACKWARD, *given[:8], activation, list(needs), backend, seed, dropout)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _backward(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend, seed=None, dropout=0.0):
    if z.shape != (*x.shape[:-1], w1.shape[0]):  # of `recompute`, or a graph exported for inference that is trained after all
        hidden, z = _hidden_again(x, w1, b1, w2, activation, backend, seed, dropout)
    given = dy, x, w1, b1, w2, b2, hidden, z, seed
    grads = _backward_plan(given, activation, tuple(needs), backend, True, dropout)(*given)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend, seed=None, dropout=0.0):
    tensors = zip((x, w1, b1, w2, b2), needs, strict=True)
    return tuple(given_fake(x if like is None else like, need and like is not None) for like, need in tensors)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "ffn_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool train, str backend,"
    " Tensor? seed=None, float dropout=0.0, bool recompute=False) -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "ffn_backward(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor hidden, Tensor z, str activation,"
    " bool[] needs, str backend, Tensor? seed=None, float dropout=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans, for any number of rows

_record = super(torch.autograd.Function, _FeedForward).apply  # less what transforms need, for which nothing may be direct


def forward_by_plan(x, w1, b1, w2, b2, activation, train, backend, seed=None, dropout=0.0):
    return plan_of(x, w1, b1, w2, b2, activation, train, backend, seed, dropout)(x, w1, b1, w2, b2, seed)


def plan_of(x, w1, b1, w2, b2, activation, train, backend, seed=None, dropout=0.0):
    """(x, w1, b1, w2, b2, seed) -> y, hidden, z."""
    given, options = (x, w1, b1, w2, b2, seed), (activation, train, backend, dropout)
    key = "op", _forward_key(given, *options)  # whose tensors nobody checked
    return PLANS.get(key) or planned.keep(key, _forward_plan(given, *options))


def _forward_key(given: tuple, activation, train, backend, dropout) -> tuple:
    x, w1, _, w2, *_ = given
    return (
        "ffn", *map(layout, given), w1.shape, w2.shape, activation, train, backend, dropout, x.device, unaligned(*given),
        without_memory(*given), fp32_precision(x.dtype),
    )  # fmt: skip


def _module(x, w1, w2, activation, backend, dropout):
    """What computes the products, and whatever is fused with them: nothing of a gated activation, which is chosen first."""
    hidden = LinearProblem(x.device.type, x.dtype, x.shape[:-1].numel(), w2.shape[1], w2.shape[0], None)
    if activation in GATED:
        gated.module_of(x, w2.shape[1], activation, backend)
        activation, dropout = None, 0.0
    return dispatch.choose("ffn", BACKENDS, backend, problem_of(x, w1, activation, dropout=dropout > 0), hidden)


def _forward_plan(given: tuple, activation, train, backend, dropout):
    x, w1, b1, w2, b2, seed = given
    up = _up_plan(x, w1, b1, w2, activation, train, backend, seed, dropout)
    module, hidden = _module(x, w1, w2, activation, backend, dropout), x.new_empty((*x.shape[:-1], w2.shape[1]))
    down = plan_of_module(module, hidden, w2, b2, None, None, train)

    def call(x, w1, b1, w2, b2, seed=None):
        hidden, z = up(x, w1, b1, None) if seed is None else up(x, w1, b1, None, seed)
        return down(hidden, w2, b2, None)[0], hidden, z

    return call


def _up_plan(x, w1, b1, w2, activation, train, backend, seed, dropout):
    """(x, w1, b1, None and, with dropout, a seed) -> the hidden layer and z."""
    module = _module(x, w1, w2, activation, backend, dropout)
    if activation not in GATED:
        return plan_of_module(module, x, w1, b1, None, activation, train, *((seed, dropout) if dropout else ()))
    product = plan_of_module(module, x, w1, b1, None, None, train)
    gate = gated.plan(x.new_empty(1, w1.shape[0]), activation, backend, seed, dropout)

    def call(x, w1, b1, _, seed=None):
        z = product(x, w1, b1, None)[0].contiguous()
        return gate(z, seed), z

    return call


def _hidden_again(x, w1, b1, w2, activation, backend, seed, dropout):
    """The hidden layer and z, as the forward of training makes them."""
    key = "hidden", _forward_key((x, w1, b1, w2, None, seed), activation, True, backend, dropout)
    plan = PLANS.get(key)
    if plan is None:
        plan = planned.keep(key, _up_plan(x, w1, b1, w2, activation, True, backend, seed, dropout))
    return plan(x, w1, b1, None, *((seed,) if dropout else ()))


def _backward_plan(tensors, activation, needs, backend, in_op: bool, dropout: float):
    """Outside of the op None where something watches, or a tensor is not plain."""
    dy, x, w1, b1, w2, b2, hidden, z, *_ = tensors
    rows = dy, x, hidden, z
    name = "ffn backward", activation, needs, backend, b1 is None, b2 is None, dropout
    given = b1, b2, tensors[8] if dropout else None
    request = name, rows, (*rows, w1, w2, *(t for t in given if t is not None))
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
        dropout,
        x.device,
        unaligned(*tensors),
        fp32_precision(x.dtype),
    )
    plan = PLANS.get(key) or planned.keep(key, _make_backward_plan(tensors, activation, needs, backend, dropout))
    remember(request, (plan, False), fp32_precision(x.dtype))
    return plan


def _make_backward_plan(tensors, activation, needs, backend, dropout):
    dy, x, w1, b1, w2, b2, hidden, z, *_ = tensors
    if activation in GATED:
        return _gated_backward_plan(tensors, activation, needs, backend, dropout)
    module = _module(x, w1, w2, activation, backend, dropout)
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    need_db1, need_db2 = need_db1 and b1 is not None, need_db2 and b2 is not None
    need_dz, through = need_dx or need_dw1 or need_db1, need_dx or need_dw1
    flags = need_dz, need_dw2, need_db2
    drop = (dropout,) if dropout else ()
    down = backward_plan_of_module(module, dy, hidden, w2, None, None, *flags, before=(z, activation), drop=drop)
    dz = x.new_empty(z.shape)
    up = backward_plan_of_module(module, dz, x, w1, None, None, need_dx, need_dw1, False) if through else None

    def call(dy, x, w1, b1, w2, b2, hidden, z, seed=None):
        dz, dw2, db2, db1 = down(dy, hidden, w2, None, z) if seed is None else down(dy, hidden, w2, None, z, seed)
        dx, dw1, _, _ = (None,) * 4 if up is None else up(dz, x, w1, None, None)
        db1 = given(db1, b1) if need_db1 else None
        return given(dx, x), given(dw1, w1), db1, given(dw2, w2), given(db2, x if b2 is None else b2)

    return call


def _gated_backward_plan(tensors, activation, needs, backend, dropout):
    dy, x, w1, b1, w2, b2, hidden, z, *seed = tensors
    module = _module(x, w1, w2, activation, backend, dropout)
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    need_db1, need_db2 = need_db1 and b1 is not None, need_db2 and b2 is not None
    need_dz = need_dx or need_dw1 or need_db1
    down = backward_plan_of_module(module, dy, hidden, w2, None, None, need_dz, need_dw2, need_db2)
    gate = gated.backward_plan(hidden, z, activation, backend, seed[0] if dropout else None, dropout)
    up = backward_plan_of_module(module, z, x, w1, None, None, need_dx, need_dw1, need_db1)

    def call(dy, x, w1, b1, w2, b2, hidden, z, seed=None):
        dhidden, dw2, db2, _ = down(dy, hidden, w2, None, None)
        dx = dw1 = db1 = None
        if need_dz:
            dx, dw1, db1, _ = up(gate(dhidden, z, seed), x, w1, None, None)
        db1 = given(db1, b1) if need_db1 else None
        return given(dx, x), given(dw1, w1), db1, given(dw2, w2), given(db2, x if b2 is None else b2)

    return call


def _request(x, w1, b1, w2, b2, activation, backend, seed=None, dropout=0.0) -> Request:
    name = "ffn", activation, backend, b1 is None, b2 is None, dropout, torch.is_grad_enabled()
    tensors = (x, w1, w2) if b1 is None else (x, w1, w2, b1)
    tensors = tensors if b2 is None else (*tensors, b2)
    return name, (x,), tensors if seed is None else (*tensors, seed)


def _look_up(x, w1, b1, w2, b2, activation, backend, seed, dropout, checked: bool) -> Known | None:
    """The plan by the key of the call, for any layout; nothing watches. None where no such call was checked before and this one
    was not either, and where a tensor is not plain."""
    given = x, w1, b1, w2, b2, seed
    if x is None or w1 is None or w2 is None or not plain(*given):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    options = activation, recorded, backend, dropout
    plan = planned.look_up(_forward_key(given, *options), lambda: _forward_plan(given, *options), checked)
    if plan is None:
        return None
    remember(_request(x, w1, b1, w2, b2, activation, backend, seed, dropout), (plan, recorded), fp32_precision(x.dtype))
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
    """dropout(act(x W1^T + b1)) W2^T + b2: the feed-forward block of a transformer layer, differentiable in every tensor.

    Args:
        x, w1, b1, w2, b2: (..., K), (F, K), (F,), (K', F) and (K',); b1 and b2 may be None. dtypes are those of `linear`.
        activation: a name, as for `linear`; or a gated one (Shazeer, 2020, arXiv:2002.05202), "geglu" (gelu by erf: ModernBERT),
            "geglu_tanh" (gelu_tanh: T5 1.1) or "swiglu" (silu). For these w1 is (2 F, K) and b1 (2 F,), and the hidden layer is
            act(a) * b with a by the first F rows and b by the others; of two matrices w1 = torch.cat([activated, factor]).
        dropout: the probability, 0 to 1, with which an element of the hidden layer is dropped, also without gradients; the others
            are divided by 1 - dropout, in fp32. The seed and the place say which: `fastattn.dropout.kept_elements`.
        seed: None, an int, or a one-element int64 tensor on x's device. None draws one from PyTorch's default generator of the
            device. Without dropout none is read or drawn.
        recompute: save nothing of the hidden layer, (..., F), for the backward, which makes it again; the gradients are the same.
        backend: "auto", "triton", "cuda" (no dropout, nothing gated), "cpu" or "eager".

    Returns:
        (..., K') in x's dtype.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.

    >>> x, w1, w2 = torch.randn(2, 7, 32), torch.randn(64, 32), torch.randn(32, 64)
    >>> fastattn.ffn(x, w1, torch.zeros(64), w2, None, activation="gelu_tanh").shape
    torch.Size([2, 7, 32])
    """
    if seed is not None or dropout != 0:
        dispatch.check_tensor(x, "x")
        seed, dropout = seed_for(dropout, seed, x.device), float(dropout)
    request = x, w1, b1, w2, b2, activation, backend, seed, dropout
    found = None if recompute or observed() else recall(*_request(*request))
    if found is None:
        quiet = not recompute and not watched()
        found = _look_up(*request, False) if quiet else None
    if found is None:
        x = _ffn_input(x, w1, b1, w2, b2, activation, recompute, backend)
        if not quiet or not plain(x, w1, b1, w2, b2, seed):
            train = dispatch.wants_autograd(x, w1, b1, w2, b2)
            return _forward_autograd(x, w1, b1, w2, b2, activation, train, backend, seed, dropout, recompute)[0]
        found = _look_up(*request, True)
        assert found is not None
    plan, recorded = found
    if recorded:
        return _record(x, w1, b1, w2, b2, activation, True, backend, seed, dropout, False, plan)
    return plan(x, w1, b1, w2, b2, seed)[0]


def _ffn_input(x, w1, b1, w2, b2, activation, recompute, backend) -> Tensor:
    """x, cast for autocast, once all arguments of `ffn` but dropout's have been checked."""
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True or False, got {recompute!r}")
    if activation is None:
        raise ValueError("activation must be a name: without one, ffn would be a single linear map")
    x, autocast = checked_input(x, activation, backend, gated=True)
    check_layer(x, x.shape[-1], {"w1": w1, "b1": b1}, autocast)
    columns = w1.shape[0]
    if activation in GATED:
        if columns % 2:
            raise ValueError(f"w1 must have an even number of rows, for {activation!r} activates the first half; got {columns}")
        columns //= 2
        if isinstance(w2, Tensor) and w2.dim() == 2 and w2.shape[1] != columns:
            halved = f"half as many columns as w1 has rows, {columns}, for {activation!r}"
            raise ValueError(f"w2 must have {halved}; got shape {tuple(w2.shape)}")
    check_layer(x, columns, {"w2": w2, "b2": b2}, autocast)
    return x
