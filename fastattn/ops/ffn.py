"""`linear` (activation and residual in one op) and `ffn`, two of them: schema, fake, autograd, public functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.activations import check_activation
from fastattn.ops import dispatch

BACKENDS = ("cpu", "eager")  # in order of preference
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


def _problem(x: Tensor, weight: Tensor, activation: str | None) -> LinearProblem:
    return LinearProblem(x.device.type, x.dtype, x.shape[:-1].numel(), x.shape[-1], weight.shape[0], activation)


# The op. y = act(z) + residual with z = x W^T + b; z is returned, else empty, where `train` says that a backward wants it.


def _forward(x, weight, bias, residual, activation, train, backend):
    module = dispatch.choose("ffn", BACKENDS, _problem(x, weight, activation), backend)
    y, z = module.forward(x, weight, bias, residual, activation, train)
    return y.contiguous(), (z.contiguous() if train and activation is not None else x.new_empty(0))


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
    @staticmethod
    def forward(ctx, x, weight, bias, residual, activation, train, backend):
        with dispatch.below_autograd():
            y, z = _FORWARD(x, weight, bias, residual, activation, train, backend)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.activation, ctx.backend = activation, backend
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx, dy, _dz):
        if dy is None:
            return (None,) * 7
        x, weight, bias, z = ctx.saved_tensors
        need_dx, need_dw, need_db, need_residual = ctx.needs_input_grad[:4]
        dx, dw, db = dispatch.call_backward(
            _BACKWARD, dy.to(x.dtype), x, weight, bias, z, ctx.activation, need_dx, need_dw, need_db, ctx.backend
        )
        residual_grad = dy.to(ctx.residual_dtype) if need_residual else None
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None, residual_grad, None, None, None


def _backward(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend):
    module = dispatch.choose("ffn", BACKENDS, _problem(x, weight, activation), backend)
    if activation is not None and z.numel() != dy.numel():  # a graph exported for inference that is trained after all
        z = module.forward(x, weight, bias, None, None, False)[0]
    need_db = need_db and bias is not None
    grads = module.backward(dy, x, weight, z, activation, need_dx, need_dw, need_db)
    dx, dw, db = (x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return dx, dw, db.to(bias.dtype) if need_db else db


def _backward_fake(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend):
    empty = x.new_empty(0)
    db = empty if bias is None or not need_db else bias.new_empty(bias.shape)
    return x.new_empty(x.shape) if need_dx else empty, weight.new_empty(weight.shape) if need_dw else empty, db


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


# Public functions


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
        x: (..., K) in fp16, bf16, fp32 or fp64.
        weight: (F, K) in x's dtype; under autocast any.
        bias: (F,) in x's dtype or fp32, or None.
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu" (z sigmoid(1.702 z)), "relu" or "silu".
        residual: (..., F) or None.
        backend: "auto", "cpu" or "eager".

    Returns:
        (..., F) in x's dtype, or in the wider one of x's and residual's.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.

    On CPUs, inference goes through oneDNN with the activation fused and may keep a packed copy of the weight: see
    `clear_packed`.
    """
    check_activation(activation)
    dispatch.check_backend(backend, BACKENDS)
    dtype = dispatch.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    _check_linear(x, weight, bias, residual, autocast=dtype is not None)
    train = dispatch.wants_autograd(x, weight, bias, residual)
    return _forward_autograd(x, weight, bias, residual, activation, train, backend)[0]


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
    for name, value, default in (("dropout", dropout, 0.0), ("seed", seed, None), ("recompute", recompute, False)):
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not served yet: leave it at {default}")
    if activation is None:
        raise ValueError("activation must be a name: without one, ffn would be a single linear map")
    hidden = linear(x, w1, b1, activation=activation, backend=backend)
    return linear(hidden, w2, b2, backend=backend)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, autocast: bool) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape (F, {x.shape[-1] if x.dim() else 'K'}), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and not autocast:
        raise TypeError(f"weight is {weight.dtype}, but x is {x.dtype}")
    outputs = (*x.shape[:-1], weight.shape[0])
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype not in (x.dtype, torch.float32) and not autocast:
            raise TypeError(f"bias must be {x.dtype} or fp32, got {bias.dtype}")
    if residual is not None and tuple(residual.shape) != outputs:
        raise ValueError(f"residual must have shape {outputs}, got {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
