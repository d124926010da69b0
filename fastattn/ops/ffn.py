"""`linear` (activation and residual in one op) and `ffn`, two of them: schemas, fakes, autograd, public functions.

`ffn` is an op of its own for its backward: the gradient of the hidden layer is multiplied by act'(z) where it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.activations import check_activation
from fastattn.ops import dispatch

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

    def __str__(self) -> str:
        sizes = f"rows={self.rows} K={self.inputs} F={self.outputs}"
        extras = f"activation: {self.activation or 'none'}{', residual' if self.residual else ''}"
        return f"linear({sizes}, {str(self.dtype).removeprefix('torch.')}, {self.device}, {extras})"


def _problem(x: Tensor, weight: Tensor, activation: str | None, residual: Tensor | None = None) -> LinearProblem:
    rows = x.shape[:-1].numel()
    return LinearProblem(x.device.type, x.dtype, rows, x.shape[-1], weight.shape[0], activation, residual is not None)


# linear: y = act(z) + residual with z = x W^T + b; z is returned, else empty, where `train` says that a backward wants it.


def _forward(x, weight, bias, residual, activation, train, backend):
    module = dispatch.choose("ffn", BACKENDS, backend, _problem(x, weight, activation, residual))
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
    module = dispatch.choose("ffn", BACKENDS, backend, _problem(x, weight, activation))
    if activation is not None and z.numel() != dy.numel():  # a graph exported for inference that is trained after all
        z = module.forward(x, weight, bias, None, None, False)[0]
    need_db = need_db and bias is not None
    dx, dw, db, _ = module.backward(dy, x, weight, z, activation, need_dx, need_dw, need_db)
    return _given(dx, x), _given(dw, weight), _given(db, x if bias is None else bias)


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as the op returns it: dense, in the dtype of its tensor, and empty where it was not asked for."""
    return like.new_empty(0) if grad is None else grad.to(like.dtype).contiguous()


def _backward_fake(dy, x, weight, bias, z, activation, need_dx, need_dw, need_db, backend):
    wanted = ((x, need_dx), (weight, need_dw), (x if bias is None else bias, need_db and bias is not None))
    return tuple(_given_fake(like, need) for like, need in wanted)


def _given_fake(like: Tensor, need: bool) -> Tensor:
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


# ffn: y = h W2^T + b2 with h = act(z), z = x W1^T + b1; h and z are returned, else empty, where `train` says so.


def _ffn_module(x, w1, w2, activation, backend):
    hidden = LinearProblem(x.device.type, x.dtype, x.shape[:-1].numel(), w1.shape[0], w2.shape[0], None)
    return dispatch.choose("ffn", BACKENDS, backend, _problem(x, w1, activation), hidden)


def _ffn_forward(x, w1, b1, w2, b2, activation, train, backend):
    module = _ffn_module(x, w1, w2, activation, backend)
    hidden, z = module.forward(x, w1, b1, None, activation, train)
    y, _ = module.forward(hidden, w2, b2, None, None, train)
    if not train:
        return y.contiguous(), x.new_empty(0), x.new_empty(0)
    return y.contiguous(), hidden.contiguous(), z.contiguous()


def _ffn_forward_fake(x, w1, b1, w2, b2, activation, train, backend):
    hidden = x.new_empty((*x.shape[:-1], w1.shape[0]) if train else 0)
    return x.new_empty(*x.shape[:-1], w2.shape[0]), hidden, x.new_empty(hidden.shape)


def _ffn_forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FFN_FORWARD(*args)
    if dispatch.wants_autograd(*args[:5]):
        return _FeedForward.apply(*args)
    with dispatch.below_autograd():
        return _FFN_FORWARD(*args)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, activation, train, backend):
        with dispatch.below_autograd():
            y, hidden, z = _FFN_FORWARD(x, w1, b1, w2, b2, activation, train, backend)
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden, z)
        ctx.activation, ctx.backend = activation, backend
        ctx.mark_non_differentiable(hidden, z)
        ctx.set_materialize_grads(False)
        return y, hidden, z

    @staticmethod
    def backward(ctx, dy, _dhidden, _dz):
        if dy is None:
            return (None,) * 8
        needs = list(ctx.needs_input_grad[:5])
        grads = dispatch.call_backward(_FFN_BACKWARD, dy, *ctx.saved_tensors, ctx.activation, needs, ctx.backend)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None)


def _ffn_backward(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend):
    module = _ffn_module(x, w1, w2, activation, backend)
    if z.numel() != x.shape[:-1].numel() * w1.shape[0]:  # a graph exported for inference that is trained after all
        hidden, z = module.forward(x, w1, b1, None, activation, True)
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    need_db1, need_db2 = need_db1 and b1 is not None, need_db2 and b2 is not None
    need_dz = need_dx or need_dw1 or need_db1
    dz, dw2, db2, db1 = module.backward(dy, hidden, w2, None, None, need_dz, need_dw2, need_db2, before=(z, activation))
    dx = dw1 = None
    if need_dx or need_dw1:
        dx, dw1, _, _ = module.backward(dz, x, w1, None, None, need_dx, need_dw1, False)
    db1 = _given(db1 if need_db1 else None, x if b1 is None else b1)
    return _given(dx, x), _given(dw1, w1), db1, _given(dw2, w2), _given(db2, x if b2 is None else b2)


def _ffn_backward_fake(dy, x, w1, b1, w2, b2, hidden, z, activation, needs, backend):
    tensors = zip((x, w1, b1, w2, b2), needs, strict=True)
    return tuple(_given_fake(x if like is None else like, need and like is not None) for like, need in tensors)


def _ffn_backward_autograd(*args):
    return dispatch.call_backward(_FFN_BACKWARD, *args)


_FFN_FORWARD = dispatch.define(
    "ffn_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool train, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _ffn_forward, _ffn_forward_fake, _ffn_forward_autograd,
)  # fmt: skip
_FFN_BACKWARD = dispatch.define(
    "ffn_backward(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor hidden, Tensor z, str activation,"
    " bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ffn_backward, _ffn_backward_fake, _ffn_backward_autograd,
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
    """
    x = _linear_input(x, weight, bias, activation, residual, backend)
    train = dispatch.wants_autograd(x, weight, bias, residual)
    return _forward_autograd(x, weight, bias, residual, activation, train, backend)[0]


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
    """
    x = _linear_input(x, weight, bias, activation, residual, backend)
    return dispatch.explain("ffn", BACKENDS, _problem(x, weight, activation, residual), backend, [])


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
    x, autocast = _checked_input(x, activation, backend)
    _check_layer(x, x.shape[-1], {"w1": w1, "b1": b1}, autocast)
    _check_layer(x, w1.shape[0], {"w2": w2, "b2": b2}, autocast)
    train = dispatch.wants_autograd(x, w1, b1, w2, b2)
    return _ffn_forward_autograd(x, w1, b1, w2, b2, activation, train, backend)[0]


def _linear_input(x, weight, bias, activation, residual, backend) -> Tensor:
    """x, cast for autocast, once all arguments of `linear` have been checked."""
    x, autocast = _checked_input(x, activation, backend)
    _check_layer(x, x.shape[-1], {"weight": weight, "bias": bias}, autocast)
    if residual is None:
        return x
    _check_tensor(residual, "residual")
    outputs = (*x.shape[:-1], weight.shape[0])
    if tuple(residual.shape) != outputs:
        raise ValueError(f"residual must have shape {outputs}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, but x is on {x.device}")
    return x


def _checked_input(x: Tensor, activation: str | None, backend: str) -> tuple[Tensor, bool]:
    """x in the dtype of the request, and whether autocast decided on it."""
    check_activation(activation)
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


def _check_layer(x: Tensor, inputs: int, layer: dict[str, Tensor | None], autocast: bool) -> None:
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
