"""`add_layer_norm` and `add_rms_norm`, norms of a residual sum: schema, fake, autograd, public functions.

Both are one op with a flag, `rms`: an RMSNorm is a LayerNorm that subtracts no mean and adds no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import planned
from fastattn.dropout import seed_for
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
    return NormProblem(x.device.type, _sum_dtype(x, residual), x.shape[-1])


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


# The op. The sum is an output only where there is a residual or dropout, without them it is x itself, which no op may return, and
# where `keep` says that somebody wants it: inference without return_sum never writes it. An RMSNorm has an empty mean. There is a
# seed if and only if dropout > 0.


def _forward(x, residual, weight, bias, eps, rms, keep, backend, seed=None, dropout=0.0):
    y, total, mean, rstd = forward_by_plan(x, residual, weight, bias, eps, rms, keep, backend, seed, dropout)
    empty = x.new_empty(0)
    return y, (empty if total is None else total), (rstd.new_empty(0) if mean is None else mean), rstd


def _forward_fake(x, residual, weight, bias, eps, rms, keep, backend, seed=None, dropout=0.0):
    total = x.new_empty(0)
    if keep and (residual is not None or seed is not None):
        total = x.new_empty(x.shape, dtype=_sum_dtype(x, residual))
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
    def forward(ctx, x, residual, weight, bias, eps, rms, keep, backend, seed=None, dropout=0.0, plan=None):
        ctx.set_materialize_grads(False)
        summed = residual is not None or seed is not None
        ctx.request = rms, keep and summed, backend, plan is not None, dropout
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        if plan is None:
            with dispatch.below_autograd():
                y, total, mean, rstd = _FORWARD(x, residual, weight, bias, eps, rms, True, backend, seed, dropout)
            ctx.mark_non_differentiable(mean, rstd)
        else:
            y, total, mean, rstd = plan(x, residual, weight, bias, None, seed)
        ctx.save_for_backward(total if summed else x, mean, rstd, weight, seed)
        if plan is None:
            return y, (total if ctx.request[1] else x.new_empty(0)), mean, rstd
        return (y, total) if ctx.request[1] else y

    @staticmethod
    def backward(ctx, dy, dtotal=None, *_):
        total, mean, rstd, weight, seed = ctx.saved_tensors
        rms, keep, backend, direct, dropout = ctx.request
        need_dx, need_dresidual, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if not keep:
            dtotal = None  # of an empty output
        if dy is None:
            dy = torch.zeros_like(total, dtype=ctx.dtypes[0])
        given = dy, dtotal, total, mean, rstd, weight, seed
        dsum, dweight, dbias, *dx = gradients(given, rms, need_dweight, need_dbias, backend, direct, dropout)
        dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            in_dtype(dx[0] if dx else dsum, dtype) if need_dx else None,
            in_dtype(dsum, residual_dtype) if need_dresidual else None,
            in_dtype(dweight, weight_dtype) if need_dweight else None, in_dtype(dbias, bias_dtype) if need_dbias else None,
            None, None, None, None, None, None, None,
        )  # fmt: skip


def gradients(
    given: tuple, rms: bool, need_dweight: bool, need_dbias: bool, backend: str, direct: bool = True, dropout: float = 0.0
) -> Any:
    """Of dy, dtotal, total, mean, rstd, weight and, with dropout, the seed: dsum, dweight, dbias and, with dropout, dx. By a
    plan, or where something watches, or where they are not `direct` results of one, by the op."""
    plan = None
    if direct and not torch.is_grad_enabled():
        plan = _backward_plan(given, need_dweight, need_dbias, backend, False, dropout)
    if plan is not None:
        return plan(*given)
    dy, dtotal, total, mean, rstd, weight, *_ = given
    options = rms, need_dweight, need_dbias, backend, given[6] if dropout else None, dropout
    empty_mean = rstd.new_empty(0) if mean is None else mean
    grads = dispatch.call_backward(_BACKWARD, dy, dtotal, total, empty_mean, rstd, weight, *options)
    return grads if dropout else grads[:3]


def _backward(dy, dtotal, total, mean, rstd, weight, rms, need_dweight, need_dbias, backend, seed=None, dropout=0.0):
    given = dy, dtotal, total, None if rms else mean, rstd, weight, seed
    dsum, dweight, dbias, *dx = _backward_plan(given, need_dweight, need_dbias, backend, True, dropout)(*given)
    dbias = None if dbias is None else dbias.clone()  # dweight's neighbour in memory, which no result of an op may be
    dx = dx[0] if dx else dy.new_empty(0)
    return dsum, *(rstd.new_empty(0) if grad is None else grad for grad in (dweight, dbias)), dx


def _backward_fake(dy, dtotal, total, mean, rstd, weight, rms, need_dweight, need_dbias, backend, seed=None, dropout=0.0):
    dweight, dbias = (rstd.new_empty(total.shape[-1] if need else 0) for need in (need_dweight, need_dbias))
    return total.new_empty(total.shape), dweight, dbias, dy.new_empty(0 if seed is None else dy.shape)


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    "add_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool keep, str backend,"
    " Tensor? seed=None, float dropout=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "add_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, bool rms,"
    " bool need_dweight, bool need_dbias, str backend, Tensor? seed=None, float dropout=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans, for any number of rows

_record = super(torch.autograd.Function, _AddNorm).apply  # less what transforms need, for which nothing may be direct


def forward_by_plan(x, residual, weight, bias, eps, rms, keep, backend, seed=None, dropout=0.0):
    return plan_of(x, residual, weight, bias, eps, rms, keep, backend, seed, dropout)(x, residual, weight, bias, None, seed)


def plan_of(x, residual, weight, bias, eps, rms, keep, backend, seed=None, dropout=0.0):
    """(x, residual, weight, bias, memory for y, seed) -> y, the sum or None, mean or None, rstd."""
    given = x, residual, weight, bias, seed
    options = eps, rms, keep, backend, True, dropout
    key = "op", _forward_key(given, *options)  # whose tensors nobody checked
    return PLANS.get(key) or planned.keep(key, _forward_plan(given, *options))


def _forward_key(given: tuple, eps, rms, keep, backend, statistics, dropout) -> tuple:
    x, residual, *_ = given
    return (
        "norm", *map(layout, given), residual is not None and residual.shape == x.shape, eps, rms, keep, backend, statistics,
        dropout, x.device, unaligned(*given), without_memory(*given),
    )  # fmt: skip


def _forward_plan(given: tuple, eps, rms, keep, backend, statistics, dropout):
    x, residual, weight, bias, seed = given
    module = dispatch.choose("norm", BACKENDS, backend, _problem(x, residual))
    if hasattr(module, "forward_plan"):
        return module.forward_plan(x, residual, weight, bias, eps, rms, keep, statistics, seed, dropout)
    summed = keep and (residual is not None or seed is not None)

    def call(x, residual, weight, bias, y=None, seed=None):
        y, total, mean, rstd = module.forward(x, residual, weight, bias, eps, rms, keep, seed, dropout)
        return y.contiguous(), total.contiguous() if summed else None, mean, rstd

    return call


def _backward_plan(given: tuple, need_dweight, need_dbias, backend, in_op: bool, dropout: float):
    """Outside of the op None where something watches, or a tensor is not plain."""
    dy, dtotal, total, mean, rstd, weight, *_ = given
    name = "norm backward", need_dweight, need_dbias, backend, dtotal is None, mean is None, weight is None, dropout
    rows = (dy, total, rstd) if mean is None else (dy, total, rstd, mean)
    if dtotal is not None:
        rows = *rows, dtotal
    tensors = rows if weight is None else (*rows, weight)
    request = name, rows, (*tensors, given[6]) if dropout else tensors
    found = None if observed() else recall(*request)
    if found is not None:
        return found[0]
    if not in_op and (watched() or not plain(*given)):
        return None
    key = *name, *map(layout, given), dy.device, unaligned(*given)
    plan = PLANS.get(key) or planned.keep(key, _make_backward_plan(given, need_dweight, need_dbias, backend, dropout))
    remember(request, (plan, False))
    return plan


def _make_backward_plan(given: tuple, need_dweight, need_dbias, backend, dropout):
    module = dispatch.choose("norm", BACKENDS, backend, _problem(given[2]))
    if hasattr(module, "backward_plan"):
        return module.backward_plan(*given[:6], need_dweight, need_dbias, given[6] if dropout else None, dropout)

    def call(dy, dtotal, total, mean, rstd, weight, seed=None):
        grads = module.backward(dy, dtotal, total, mean, rstd, weight, need_dweight, need_dbias, seed, dropout)
        return [None if grad is None else grad.contiguous() for grad in grads]

    return call


def _request(x, residual, weight, bias, eps, rms, return_sum, backend, seed=None, dropout=0.0) -> Request:
    name = (
        "norm", eps, rms, return_sum, backend, residual is None, weight is None, bias is None, dropout, torch.is_grad_enabled()
    )  # fmt: skip
    rows = (x,) if residual is None else (x, residual)
    tensors = rows if weight is None else (*rows, weight)
    tensors = tensors if bias is None else (*tensors, bias)
    return name, rows, tensors if seed is None else (*tensors, seed)


def _look_up(x, residual, weight, bias, eps, rms, return_sum, backend, seed, dropout, checked: bool) -> Known | None:
    """The plan by the key of the call, for any layout; nothing watches. None where no such call was checked before and this one
    was not either, and where a tensor is not plain."""
    given = x, residual, weight, bias, seed
    if x is None or not plain(*given):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    options = eps, rms, return_sum or recorded, backend, recorded, dropout
    plan = planned.look_up(_forward_key(given, *options), lambda: _forward_plan(given, *options), checked)
    if plan is None:
        return None
    remember(_request(x, residual, weight, bias, eps, rms, return_sum, backend, seed, dropout), (plan, recorded))
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
    """LayerNorm(residual + dropout(x)) over the last dimension (Ba et al., 2016, arXiv:1607.06450); every tensor has a gradient.

    Args:
        x: (..., d) in fp16, bf16, fp32 or fp64.
        residual: (..., d) in any of these, or None for a plain LayerNorm of x.
        weight, bias: (d,) in x's dtype or fp32, or None.
        eps: added to the variance, > 0. The default is BERT's 1e-12, not nn.LayerNorm's 1e-5: give the eps of your norm.
        dropout: the probability, 0 to 1, with which an element of x is dropped before the sum, also without gradients; the others
            are divided by 1 - dropout, in fp32. The seed and the place say which: `fastattn.dropout.kept_elements`.
        seed: None, an int, or a one-element int64 tensor on x's device. None draws one from PyTorch's default generator of the
            device. Without dropout none is read or drawn.
        return_sum: also return residual + dropout(x), in the wider of their dtypes, as pre-norm models need it.
        backend: "auto", "triton", "cpu" or "eager".

    Returns:
        y (..., d) in x's dtype, or (y, sum). Mean and variance are computed in fp32 (fp64 for fp64 inputs). Autocast casts
        nothing here.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.

    >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 5.0]])
    >>> y, total = fastattn.add_layer_norm(x, residual, torch.ones(2), torch.zeros(2), return_sum=True)
    >>> y.round(decimals=3), total
    (tensor([[-1.,  1.]]), tensor([[2., 8.]]))
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
    """s * rsqrt(mean(s^2) + eps) * weight, s = residual + dropout(x): T5's norm (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Arguments, results and errors are those of `add_layer_norm`; there is no bias, and no mean is subtracted. The default of eps
    is T5's 1e-6; nn.RMSNorm's depends on the dtype.

    >>> fastattn.add_rms_norm(torch.tensor([[3.0, 4.0]]), None, torch.full((2,), 10.0))  # 12.5 is the mean square
    tensor([[ 8.4853, 11.3137]])
    """
    return _add_norm(x, residual, weight, None, eps, dropout, seed, return_sum, backend, rms=True)


def _add_norm(x, residual, weight, bias, eps, dropout, seed, return_sum, backend, *, rms):
    if seed is not None or dropout != 0:
        dispatch.check_tensor(x, "x")
        seed, dropout = seed_for(dropout, seed, x.device), float(dropout)
    summed = residual is not None or seed is not None  # else the sum is x
    request = x, residual, weight, bias, eps, rms, return_sum, backend, seed, dropout
    found = None if observed() else recall(*_request(*request))
    if found is None or (residual is not None and residual.shape != x.shape):
        quiet = not watched()
        found = _look_up(*request, False) if quiet else None
    if found is None:
        dispatch.check_backend(backend, BACKENDS)
        _check_norm(x, residual, weight, bias, eps)
        if not quiet or not plain(x, residual, weight, bias, seed) or type(eps) not in (int, float):
            y, total, _, _ = _forward_autograd(*request)
            return (y, total if summed else x) if return_sum else y
        found = _look_up(*request, True)
        assert found is not None
    plan, recorded = found
    if not recorded:
        y, total, _, _ = plan(x, residual, weight, bias, None, seed)
    else:
        y = _record(*request, plan)
        y, total = y if return_sum and summed else (y, None)
    return (y, total if summed else x) if return_sum else y


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
