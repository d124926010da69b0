"""`add_layer_norm`, LayerNorm of a residual sum: schema, fake, autograd, public function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops import dispatch

BACKENDS = ("cpu", "eager")  # in order of preference


@dataclass(frozen=True)
class NormProblem:
    """One request, from metadata alone."""

    device: str
    dtype: torch.dtype
    width: int


def _problem(x: Tensor) -> NormProblem:
    return NormProblem(x.device.type, x.dtype, x.shape[-1])


# The op. The sum is an output only where there is a residual: without one it is x itself, which no op may return.


def _forward(x, residual, weight, bias, eps, backend):
    module = dispatch.choose("norm", BACKENDS, _problem(x), backend)
    total = x if residual is None else (residual + x).contiguous()
    y, mean, rstd = module.forward(total, weight, bias, eps)
    return y.to(x.dtype).contiguous(), (x.new_empty(0) if residual is None else total), mean, rstd


def _forward_fake(x, residual, weight, bias, eps, backend):
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = x.new_empty(*x.shape[:-1], 1, dtype=stats)
    return x.new_empty(x.shape), total, mean, torch.empty_like(mean)


def _forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)
    if dispatch.wants_autograd(*args[:4]):
        return _AddLayerNorm.apply(*args)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, backend):
        with dispatch.below_autograd():
            y, total, mean, rstd = _FORWARD(x, residual, weight, bias, eps, backend)
        ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        ctx.backend = backend
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, total, mean, rstd

    @staticmethod
    def backward(ctx, dy, dtotal, _dmean, _drstd):
        total, mean, rstd, weight = ctx.saved_tensors
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if residual_dtype is None:
            dtotal = None  # of the empty output
        if dy is None:
            dy = torch.zeros_like(total, dtype=x_dtype)
        dsum, dweight, dbias = dispatch.call_backward(_BACKWARD, dy, dtotal, total, mean, rstd, weight, ctx.backend)
        wanted = zip((dsum, dsum, dweight, dbias), ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(grad.to(dtype) if need else None for grad, dtype, need in wanted), None, None)


def _backward(dy, dtotal, total, mean, rstd, weight, backend):
    module = dispatch.choose("norm", BACKENDS, _problem(total), backend)
    dsum, dweight, dbias = module.backward(dy, total, mean, rstd, weight)
    if dtotal is not None:
        dsum = dsum + dtotal
    return dsum.to(total.dtype).contiguous(), dweight.to(mean.dtype), dbias.to(mean.dtype)


def _backward_fake(dy, dtotal, total, mean, rstd, weight, backend):
    dweight = mean.new_empty(total.shape[-1])
    return total.new_empty(total.shape), dweight, torch.empty_like(dweight)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "add_layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + x) over the last dimension (Ba et al., 2016, arXiv:1607.06450), differentiable in every tensor.

    Args:
        x: (..., d) in fp16, bf16, fp32 or fp64.
        residual: (..., d), or None for a plain LayerNorm of x.
        weight, bias: (d,) in x's dtype or fp32, or None.
        eps: added to the variance, > 0.
        dropout, seed: not served yet; anything but the default raises NotImplementedError.
        return_sum: also return residual + x, in the wider of their dtypes, as pre-norm models need it.
        backend: "auto", "cpu" or "eager".

    Returns:
        y (..., d) in x's dtype, or (y, sum). Mean and variance are computed in fp32 (fp64 for fp64 inputs). Autocast casts
        nothing here.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.
    """
    for name, value, default in (("dropout", dropout, 0.0), ("seed", seed, None)):
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not served yet: leave it at {default}")
    dispatch.check_backend(backend, BACKENDS)
    _check_norm(x, residual, weight, bias, eps)
    y, total, _, _ = _forward_autograd(x, residual, weight, bias, eps, backend)
    if return_sum:
        return y, x if residual is None else total
    return y


def _check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {tuple(tensor.shape)}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be {x.dtype} or fp32, got {tensor.dtype}")
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
