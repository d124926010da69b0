"""`add_layer_norm` and `add_rms_norm`, norms of a residual sum: schema, fake, autograd, public functions.

Both are one op with a flag, `rms`: an RMSNorm is a LayerNorm that subtracts no mean and adds no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import planned
from fastattn.ops import dispatch
from fastattn.ops.dispatch import in_dtype
from fastattn.planned import PLANS, Known, Request, layout, observed, plain, recall, remember, unaligned, watched, without_memory

BACKENDS = ("triton", "cpu", "eager")  # in order of preference
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NormProblem:
    """One request, from metadata alone."""

    device: str
    dtype: torch.dtype  # of the sum
    width: int

    def __str__(self) -> str:
        return f"norm(width={self.width}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


def _problem(x: Tensor, residual: Tensor | None = None) -> NormProblem:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return NormProblem(x.device.type, dtype, x.shape[-1])


# The op. The sum is an output only where there is a residual, without one it is x itself, which no op may return, and where
# `keep` says that somebody wants it: inference without return_sum never writes it. An RMSNorm has an empty mean.


def _forward(x, residual, weight, bias, eps, rms, keep, backend):
    y, total, mean, rstd = forward_by_plan(x, residual, weight, bias, eps, rms, keep, backend)
    empty = x.new_empty(0)
    return y, (empty if total is None else total), (rstd.new_empty(0) if mean is None else mean), rstd


def _forward_fake(x, residual, weight, bias, eps, rms, keep, backend):
    total = x.new_empty(0)
    if keep and residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), total, rstd.new_empty(0 if rms else rstd.shape), rstd


def _forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)
    if dispatch.wants_autograd(*args[:4]):
        return _AddNorm.apply(*args)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _AddNorm(torch.autograd.Function):
    """By a plan, or by the ops, whose four outputs are all there then."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, rms, keep, backend, plan=None):
        ctx.set_materialize_grads(False)
        ctx.request = rms, keep and residual is not None, backend, plan is not None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        if plan is None:
            with dispatch.below_autograd():
                y, total, mean, rstd = _FORWARD(x, residual, weight, bias, eps, rms, True, backend)
            ctx.mark_non_differentiable(mean, rstd)
        else:
            y, total, mean, rstd = plan(x, residual, weight, bias)
        ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)
        if plan is None:
            return y, (total if ctx.request[1] else x.new_empty(0)), mean, rstd
        return (y, total) if ctx.request[1] else y

    @staticmethod
    def backward(ctx, dy, dtotal=None, *_):
        total, mean, rstd, weight = ctx.saved_tensors
        rms, keep, backend, direct = ctx.request
        need_dx, need_dresidual, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if not keep:
            dtotal = None  # of an empty output
        if dy is None:
            dy = torch.zeros_like(total, dtype=ctx.dtypes[0])
        given = dy, dtotal, total, mean, rstd, weight
        dsum, dweight, dbias = gradients(given, rms, need_dweight, need_dbias, backend, direct)
        dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            in_dtype(dsum, dtype) if need_dx else None, in_dtype(dsum, residual_dtype) if need_dresidual else None,
            in_dtype(dweight, weight_dtype) if need_dweight else None, in_dtype(dbias, bias_dtype) if need_dbias else None,
            None, None, None, None, None,
        )  # fmt: skip


def gradients(given: tuple, rms: bool, need_dweight: bool, need_dbias: bool, backend: str, direct: bool = True) -> Any:
    """Of dy, dtotal, total, mean, rstd and weight: dsum, dweight and dbias. By a plan, or where something watches, or where they
    are not `direct` results of one, by the op."""
    plan = _backward_plan(given, need_dweight, need_dbias, backend, False) if direct and not torch.is_grad_enabled() else None
    if plan is not None:
        return plan(*given)
    dy, dtotal, total, mean, rstd, weight = given
    empty_mean = rstd.new_empty(0) if mean is None else mean
    return dispatch.call_backward(_BACKWARD, dy, dtotal, total, empty_mean, rstd, weight, rms, need_dweight, need_dbias, backend)


def _backward(dy, dtotal, total, mean, rstd, weight, rms, need_dweight, need_dbias, backend):
    given = dy, dtotal, total, None if rms else mean, rstd, weight
    dsum, dweight, dbias = _backward_plan(given, need_dweight, need_dbias, backend, True)(*given)
    dbias = None if dbias is None else dbias.clone()  # dweight's neighbour in memory, which no result of an op may be
    return tuple(rstd.new_empty(0) if grad is None else grad for grad in (dsum, dweight, dbias))


def _backward_fake(dy, dtotal, total, mean, rstd, weight, rms, need_dweight, need_dbias, backend):
    dweight, dbias = (rstd.new_empty(total.shape[-1] if need else 0) for need in (need_dweight, need_dbias))
    return total.new_empty(total.shape), dweight, dbias


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "add_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "add_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, bool rms,"
    " bool need_dweight, bool need_dbias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans, for any number of rows

_record = super(torch.autograd.Function, _AddNorm).apply  # less what transforms need, for which nothing may be direct


def forward_by_plan(x, residual, weight, bias, eps, rms, keep, backend):
    return plan_of(x, residual, weight, bias, eps, rms, keep, backend)(x, residual, weight, bias)


def plan_of(x, residual, weight, bias, eps, rms, keep, backend):
    """(x, residual, weight, bias) -> y, the sum or None, mean or None, rstd."""
    key = "op", _forward_key(x, residual, weight, bias, eps, rms, keep, backend, True)  # whose tensors nobody checked
    return PLANS.get(key) or planned.keep(key, _forward_plan(x, residual, weight, bias, eps, rms, keep, backend, True))


def _forward_key(x, residual, weight, bias, eps, rms, keep, backend, statistics) -> tuple:
    given = x, residual, weight, bias
    return (
        "norm", *map(layout, given), residual is not None and residual.shape == x.shape, eps, rms, keep, backend, statistics,
        x.device, unaligned(*given), without_memory(*given),
    )  # fmt: skip


def _forward_plan(x, residual, weight, bias, eps, rms, keep, backend, statistics):
    module = dispatch.choose("norm", BACKENDS, backend, _problem(x, residual))
    if hasattr(module, "forward_plan"):
        return module.forward_plan(x, residual, weight, bias, eps, rms, keep, statistics)

    def call(x, residual, weight, bias):
        y, total, mean, rstd = module.forward(x, residual, weight, bias, eps, rms, keep)
        return y.contiguous(), total.contiguous() if keep and residual is not None else None, mean, rstd

    return call


def _backward_plan(given: tuple, need_dweight, need_dbias, backend, in_op: bool):
    """Outside of the op None where something watches, or a tensor is not plain."""
    dy, dtotal, total, mean, rstd, weight = given
    name = "norm backward", need_dweight, need_dbias, backend, dtotal is None, mean is None, weight is None
    rows = (dy, total, rstd) if mean is None else (dy, total, rstd, mean)
    if dtotal is not None:
        rows = *rows, dtotal
    request = name, rows, rows if weight is None else (*rows, weight)
    found = None if observed() else recall(*request)
    if found is not None:
        return found[0]
    if not in_op and (watched() or not plain(*given)):
        return None
    key = *name, *map(layout, given), dy.device, unaligned(*given)
    plan = PLANS.get(key) or planned.keep(key, _make_backward_plan(given, need_dweight, need_dbias, backend))
    remember(request, (plan, False))
    return plan


def _make_backward_plan(given: tuple, need_dweight, need_dbias, backend):
    module = dispatch.choose("norm", BACKENDS, backend, _problem(given[2]))
    if hasattr(module, "backward_plan"):
        return module.backward_plan(*given, need_dweight, need_dbias)

    def call(*given):
        return [None if grad is None else grad.contiguous() for grad in module.backward(*given, need_dweight, need_dbias)]

    return call


def _request(x, residual, weight, bias, eps, rms, return_sum, backend) -> Request:
    name = "norm", eps, rms, return_sum, backend, residual is None, weight is None, bias is None, torch.is_grad_enabled()
    rows = (x,) if residual is None else (x, residual)
    tensors = rows if weight is None else (*rows, weight)
    return name, rows, tensors if bias is None else (*tensors, bias)


def _look_up(x, residual, weight, bias, eps, rms, return_sum, backend, checked: bool) -> Known | None:
    """The plan by the key of the call, for any layout; nothing watches. None where no such call was checked before and this one
    was not either, and where a tensor is not plain."""
    given = x, residual, weight, bias
    if x is None or not plain(*given):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    options = eps, rms, return_sum or recorded, backend, recorded
    key = _forward_key(*given, *options)
    plan = planned.look_up(key, lambda: _forward_plan(*given, *options), checked)
    if plan is None:
        return None
    remember(_request(*given, eps, rms, return_sum, backend), (plan, recorded))
    return plan, recorded


# Public functions


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
        residual: (..., d) in any of these, or None for a plain LayerNorm of x.
        weight, bias: (d,) in x's dtype or fp32, or None.
        eps: added to the variance, > 0. The default is BERT's 1e-12, not nn.LayerNorm's 1e-5: give the eps of your norm.
        dropout, seed: not served yet; anything but the default raises NotImplementedError.
        return_sum: also return residual + x, in the wider of their dtypes, as pre-norm models need it.
        backend: "auto", "triton", "cpu" or "eager".

    Returns:
        y (..., d) in x's dtype, or (y, sum). Mean and variance are computed in fp32 (fp64 for fp64 inputs). Autocast casts
        nothing here.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.
    """
    return _add_norm(x, residual, weight, bias, eps, dropout, seed, return_sum, backend, rms=False)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """s * rsqrt(mean(s^2) + eps) * weight with s = residual + x: T5's norm (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Arguments, results and errors are those of `add_layer_norm`; there is no bias, and no mean is subtracted. The default of eps
    is T5's 1e-6; nn.RMSNorm's depends on the dtype.
    """
    return _add_norm(x, residual, weight, None, eps, dropout, seed, return_sum, backend, rms=True)


def _add_norm(x, residual, weight, bias, eps, dropout, seed, return_sum, backend, *, rms):
    default = dropout == 0.0 and seed is None
    request = x, residual, weight, bias, eps, rms, return_sum, backend
    found = recall(*_request(*request)) if default and not observed() else None
    if found is None or (residual is not None and residual.shape != x.shape):
        quiet = default and not watched()
        found = _look_up(*request, False) if quiet else None
    if found is None:
        for name, value, default in (("dropout", dropout, 0.0), ("seed", seed, None)):
            if value is not default and value != default:
                raise NotImplementedError(f"{name} is not served yet: leave it at {default}")
        dispatch.check_backend(backend, BACKENDS)
        _check_norm(x, residual, weight, bias, eps)
        if not quiet or not plain(x, residual, weight, bias) or type(eps) not in (int, float):
            y, total, _, _ = _forward_autograd(*request)
            return (y, x if residual is None else total) if return_sum else y
        found = _look_up(*request, True)
        assert found is not None
    plan, recorded = found
    if not recorded:
        y, total, _, _ = plan(x, residual, weight, bias)
    else:
        y = _record(*request, plan)
        y, total = y if return_sum and residual is not None else (y, None)
    return (y, x if residual is None else total) if return_sum else y


def _check_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if name == "x" or tensor is not None:
            dispatch.check_tensor(tensor, name)
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
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
