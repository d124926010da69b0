"""`linear`, activation and residual in one op: schema, fake, autograd, plans, public function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import planned
from fastattn.activations import check_activation
from fastattn.ops import dispatch
from fastattn.ops.dispatch import in_dtype
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

BACKENDS = ("triton", "cuda", "cpu", "eager")  # in order of preference
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LinearProblem:
    """One request, from metadata alone."""

    device: str
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    activation: str | None
    residual: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        sizes = f"rows={self.rows} K={self.inputs} F={self.outputs}"
        parts = ", residual" * self.residual + ", dropout" * self.dropout
        extras = f"activation: {self.activation or 'none'}{parts}"
        return f"linear({sizes}, {str(self.dtype).removeprefix('torch.')}, {self.device}, {extras})"


def problem_of(
    x: Tensor, weight: Tensor, activation: str | None, residual: Tensor | None = None, dropout: bool = False
) -> LinearProblem:
    rows = x.shape[:-1].numel()
    return LinearProblem(x.device.type, x.dtype, rows, x.shape[-1], weight.shape[0], activation, residual is not None, dropout)


# linear: y = act(z) + residual with z = x W^T + b; z is returned, else empty, where `train` says that a backward wants it.


def _forward(x, weight, bias, residual, activation, train, backend):
    y, z = _forward_by_plan(x, weight, bias, residual, activation, train, backend)
    return y, (x.new_empty(0) if z is None else z)


def _forward_fake(x, weight, bias, residual, activation, train, backend):
    z = x.new_empty(*x.shape[:-1], weight.shape[0])
    y = z.new_empty(z.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    return y, (z if train and activation is not None else x.new_empty(0))


def _forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)
    if dispatch.wants_autograd(*args[:4]):
        return _Linear.apply(*args)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _Linear(torch.autograd.Function):
    """By a plan, or by the ops, whose two outputs are both there then."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, activation, train, backend, plan=None):
        ctx.request = activation, backend, plan is not None, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        if plan is not None:
            y, z = plan(x, weight, bias, residual)
            ctx.save_for_backward(x, weight, bias, z)
            return y
        with dispatch.below_autograd():
            y, z = _FORWARD(x, weight, bias, residual, activation, train, backend)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 8
        x, weight, bias, z = ctx.saved_tensors
        activation, backend, direct, residual_dtype = ctx.request
        need_dx, need_dw, need_db, need_residual, *_ = ctx.needs_input_grad
        residual_grad = in_dtype(dy, residual_dtype) if need_residual else None
        dy, needs = in_dtype(dy, x.dtype), (need_dx, need_dw, need_db)
        plan = None
        if direct and not torch.is_grad_enabled():
            plan = _backward_plan(dy, x, weight, bias, z, activation, *needs, backend, False)
        if plan is not None:
            grads = _run_backward(plan, dy, x, weight, bias, z)
        else:
            z = x.new_empty(0) if z is None else z
            grads = dispatch.call_backward(_BACKWARD, dy, x, weight, bias, z, activation, *needs, backend)
            grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*grads, residual_grad, None, None, None, None)


def _backward(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend):
    if activation is None:
        z = None
    elif z.numel() != dy.numel():  # a graph exported for inference that is trained after all
        z = _forward_by_plan(x, weight, bias, None, None, False, backend)[0]
    plan = _backward_plan(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend, True)
    dx, dw, db = _run_backward(plan, dy, x, weight, bias, z)
    return _op_result(dx, x), _op_result(dw, weight), _op_result(db, x if bias is None else bias)


def given(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient as it is returned: dense, in the dtype of its tensor."""
    return None if grad is None else in_dtype(grad, like.dtype).contiguous()


def _op_result(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _backward_fake(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend):
    wanted = ((x, need_dx), (weight, need_dw), (x if bias is None else bias, need_db and bias is not None))
    return tuple(given_fake(like, need) for like, need in wanted)


def given_fake(like: Tensor, need: bool) -> Tensor:
    return like.new_empty(like.shape if need else 0)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation, bool train, str backend)"
    " -> (Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor z, str? activation, bool need_dx, bool need_dw,"
    " bool need_db, str backend) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans, for any number of rows

_record = super(torch.autograd.Function, _Linear).apply  # less what transforms need, for which nothing may be direct


def _forward_by_plan(x, weight, bias, residual, activation, train, backend):
    key = "op", _forward_key(x, weight, bias, residual, activation, train, backend)  # whose tensors nobody checked
    plan = PLANS.get(key) or planned.keep(key, _forward_plan(x, weight, bias, residual, activation, train, backend))
    return plan(x, weight, bias, residual)


def _forward_key(x, weight, bias, residual, activation, train, backend) -> tuple:
    given = x, weight, bias, residual
    return (
        "linear", *map(layout, given), weight.shape, residual is not None and residual.shape[:-1] == x.shape[:-1],
        activation, train, backend, x.device, unaligned(*given), without_memory(*given), fp32_precision(x.dtype),
    )  # fmt: skip


def _forward_plan(x, weight, bias, residual, activation, train, backend):
    module = dispatch.choose("ffn", BACKENDS, backend, problem_of(x, weight, activation, residual))
    return plan_of_module(module, x, weight, bias, residual, activation, train)


def plan_of_module(module, x, weight, bias, residual, activation, train, *drop):
    """(x, weight, bias, residual) -> y and, with an activation where `train` says so, z. Where the activation's result goes
    through dropout, `drop` is a seed and the probability, and the plan takes a seed too."""
    if hasattr(module, "forward_plan"):
        return module.forward_plan(x, weight, bias, residual, activation, train, *drop)

    def call(x, weight, bias, residual, *seed):
        y, z = module.forward(x, weight, bias, residual, activation, train, *seed, *drop[1:])
        return y.contiguous(), z.contiguous() if train and activation is not None else None

    return call


def _backward_plan(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend, in_op: bool):
    """Outside of the op None where something watches, or a tensor is not plain."""
    flags = activation, need_dx, need_dw, need_db and bias is not None
    rows = (dy, x) if z is None else (dy, x, z)
    request = ("linear backward", z is None, *flags, backend), rows, (*rows, weight)
    found = None if observed() else recall(*request)
    if found is not None:
        return found[0]
    tensors = dy, x, weight, z
    if not in_op and (watched() or not plain(*tensors)):
        return None
    key = "linear backward", *map(layout, tensors), *flags, backend, x.device, unaligned(*tensors), fp32_precision(x.dtype)
    plan = PLANS.get(key)
    if plan is None:
        module = dispatch.choose("ffn", BACKENDS, backend, problem_of(x, weight, activation))
        plan = planned.keep(key, backward_plan_of_module(module, *tensors, *flags))
    remember(request, (plan, False), fp32_precision(x.dtype))
    return plan


def _run_backward(plan, dy, x, weight, bias, z):
    dx, dw, db, _ = plan(dy, x, weight, z, None)
    return given(dx, x), given(dw, weight), given(db, x if bias is None else bias)


def backward_plan_of_module(module, dy, x, weight, z, activation, need_dx, need_dw, need_db, before=None, drop=()):
    """(dy, x, weight, z, z before) -> what `fastattn.reference.linear_backward` gives; a seed too, where x is what dropout left,
    of which `drop` is the probability."""
    if hasattr(module, "backward_plan"):
        return module.backward_plan(dy, x, weight, z, activation, need_dx, need_dw, need_db, before, *drop)

    def call(dy, x, weight, z, z_before, *seed):
        behind = None if before is None else (z_before, before[1])
        return module.backward(dy, x, weight, z, activation, need_dx, need_dw, need_db, behind, *seed, *drop)

    return call


def _request(x, weight, bias, residual, activation, backend) -> Request:
    name = "linear", activation, backend, residual is None, bias is None, torch.is_grad_enabled()
    rows = (x,) if residual is None else (x, residual)
    return name, rows, (*rows, weight) if bias is None else (*rows, weight, bias)


def _look_up(x, weight, bias, residual, activation, backend, checked: bool) -> Known | None:
    """The plan by the key of the call, for any layout; nothing watches. None where no such call was checked before and this one
    was not either, and where a tensor is not plain."""
    given = x, weight, bias, residual
    if x is None or weight is None or not plain(*given):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    key = _forward_key(*given, activation, recorded, backend)
    plan = planned.look_up(key, lambda: _forward_plan(*given, activation, recorded, backend), checked)
    if plan is None:
        return None
    remember(_request(*given, activation, backend), (plan, recorded), fp32_precision(x.dtype))
    return plan, recorded


# The public function


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """act(x W^T + b) + residual, differentiable in every tensor.

    Args:
        x: (..., K) in fp16, bf16, fp32 or fp64 (fp64: backends `eager` and `cpu`).
        weight: (F, K) in x's dtype; under autocast any.
        bias: (F,) in x's dtype or fp32, or None.
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu" (z sigmoid(1.702 z)), "relu" or "silu".
        residual: (..., F) or None.
        backend: "auto", or one of "triton", "cuda", "cpu", "eager"; a named backend never falls back.

    Returns:
        (..., F) in x's dtype, or in the wider one of x's and residual's.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.

    On CPUs, inference goes through oneDNN with the activation fused and may keep a packed copy of the weight: see
    `clear_packed`. `explain_linear` says which backend serves, and which part another library does.

    >>> x, weight, residual = torch.tensor([[1.0, -2.0]]), torch.eye(2), torch.tensor([[10.0, 20.0]])
    >>> fastattn.linear(x, weight, activation="relu", residual=residual)
    tensor([[11., 20.]])
    """
    found = None if observed() else recall(*_request(x, weight, bias, residual, activation, backend))
    if found is None or (residual is not None and residual.shape[:-1] != x.shape[:-1]):
        quiet = not watched()
        found = _look_up(x, weight, bias, residual, activation, backend, False) if quiet else None
    if found is None:
        x = _linear_input(x, weight, bias, activation, residual, backend)
        if not quiet or not plain(x, weight, bias, residual):
            train = dispatch.wants_autograd(x, weight, bias, residual)
            return _forward_autograd(x, weight, bias, residual, activation, train, backend)[0]
        found = _look_up(x, weight, bias, residual, activation, backend, True)
        assert found is not None
    plan, recorded = found
    if recorded:
        return _record(x, weight, bias, residual, activation, True, backend, plan)
    return plan(x, weight, bias, residual)[0]


def explain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> dispatch.Explanation:
    """Which backend `linear` would take for these arguments, why not the others, and what it leaves to a library.

    Runs no kernel. `ffn` is such a `linear` with the activation, and one without.

    >>> x, weight = torch.randn(3, 8), torch.randn(4, 8)
    >>> fastattn.explain_linear(x, weight, activation="gelu").backend
    'cpu'
    """
    x = _linear_input(x, weight, bias, activation, residual, backend)
    return dispatch.explain("ffn", BACKENDS, problem_of(x, weight, activation, residual), backend, [])


def _linear_input(x, weight, bias, activation, residual, backend) -> Tensor:
    """x, cast for autocast, once all arguments of `linear` have been checked."""
    x, autocast = checked_input(x, activation, backend)
    check_layer(x, x.shape[-1], {"weight": weight, "bias": bias}, autocast)
    if residual is None:
        return x
    _check_tensor(residual, "residual")
    outputs = (*x.shape[:-1], weight.shape[0])
    if tuple(residual.shape) != outputs:
        raise ValueError(f"residual must have shape {outputs}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, but x is on {x.device}")
    return x


def checked_input(x: Tensor, activation: str | None, backend: str, gated: bool = False) -> tuple[Tensor, bool]:
    """x in the dtype of the request, and whether autocast decided on it; with `gated` those activations are served too."""
    check_activation(activation, gated)
    dispatch.check_backend(backend, BACKENDS)
    _check_tensor(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension")
    dtype = dispatch.autocast_dtype(x)
    return x if dtype is None else x.to(dtype), dtype is not None


def _check_tensor(x: Any, name: str) -> None:
    dispatch.check_tensor(x, name)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")


def check_layer(x: Tensor, inputs: int, layer: dict[str, Tensor | None], autocast: bool) -> None:
    """`layer` is {name: weight, name: bias}: the weight must take `inputs` numbers, and both must be x's kind of tensor."""
    (weight_name, weight), (bias_name, bias) = layer.items()
    for name, tensor in layer.items():
        if tensor is not None or name == weight_name:
            _check_tensor(tensor, name)
    assert weight is not None
    if weight.dim() != 2 or weight.shape[1] != inputs:
        raise ValueError(f"{weight_name} must have shape (F, {inputs}), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and not autocast:
        raise TypeError(f"{weight_name} is {weight.dtype}, but x is {x.dtype}")
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{bias_name} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32) and not autocast:
            raise TypeError(f"{bias_name} must be {x.dtype} or fp32, got {bias.dtype}")
    for name, tensor in layer.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
