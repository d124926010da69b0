"""`attention`: problem, schema, fake, autograd, public functions.

Calls go attention -> `direct` -> plan -> kernels/<backend>/attention.py, or where something watches, attention -> op (or autograd
Function around it) -> the same plan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastattn import masks, plans
from fastattn.lowering import LoweredMask, Prepared, batched, side_by_side
from fastattn.masks import Mask
from fastattn.ops import dispatch
from fastattn.planned import PLAIN, PLANS, fp32_precision, keep, plain, plain_types, unaligned, watched

# In order of preference. On an H100 `triton` is faster than `cuda` on every shape that was timed, from 50 keys to 1,024, forward
# and backward (benchmarks/results/h100: a test holds the order to it), although `cuda` moves fewer bytes up to 288 keys. No other
# GPU was timed; the order is the same there, as the count of bytes, the only reason for another one, did not decide here.
BACKENDS = ("triton", "cuda", "cpu", "eager")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """One request, from metadata alone: what a backend accepts or refuses, and what its config depends on."""

    device: str
    dtype: torch.dtype
    B: int
    H: int
    M: int
    N: int
    D: int
    Hkv: int  # heads of k and v
    Dv: int  # head dimension of v
    band: bool = False  # low or high
    prefix: bool = False
    ranges: bool = False  # key_begin, key_end or query_end
    keys: bool = False
    documents: bool = False
    bits: bool = False
    packed: bool = False  # B sequences laid end to end, of at most M queries and N keys

    def __str__(self) -> str:
        mask = [name for name in ("band", "prefix", "ranges", "keys", "documents", "bits") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.B} H={self.H} M={self.M} N={self.N} D={self.D}"
        sizes += f" Hkv={self.Hkv}" * (self.Hkv != self.H) + f" Dv={self.Dv}" * (self.Dv != self.D)
        return f"{'varlen_' * self.packed}attention({sizes}, {dtype}, {self.device}, mask: {' & '.join(mask) or 'none'})"


def problem_of(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> AttentionProblem:
    B, H, M, D = q.shape
    N = k.shape[2]
    if mask.query_starts is not None:
        assert mask.max_queries is not None and mask.max_keys is not None
        B, M, N = mask.query_starts.shape[0] - 1, mask.max_queries, mask.max_keys
    return AttentionProblem(
        q.device.type, q.dtype, B, H, M, N, D, k.shape[1], v.shape[3],
        band=mask.low is not None or mask.high is not None,
        prefix=mask.prefix is not None,
        ranges=mask.key_begin is not None or mask.key_end is not None or mask.query_end is not None,
        keys=mask.keys is not None,
        documents=mask.ids is not None,
        bits=mask.bits is not None,
        packed=mask.query_starts is not None,
    )  # fmt: skip


# The op. `exact_lse` says that the caller wants lse itself; without it only the backward reads it, and a backend may save work.

_TYPES = dict.fromkeys(("low", "high", "prefix_high", "max_queries", "max_keys"), "SymInt") | {"all_rows": "bool"}
_MASK = ", ".join(f"{_TYPES.get(name, 'Tensor')}? {name}" for name in LoweredMask._fields)
_TENSORS = tuple(name for name in LoweredMask._fields if name not in _TYPES)
_REQUEST = f"{_MASK}, float scale, str backend"


def _forward(q, k, v, *rest):
    *fields, scale, backend, exact_lse = rest
    return forward_by_plan(q, k, v, Prepared(LoweredMask(*fields)), scale, backend, EXACT if exact_lse else SAVED)


def _forward_fake(q, k, v, *rest):
    B, H, M, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, M, H, v.shape[3]).transpose(1, 2), q.new_empty(B, H, M, dtype=lse_dtype)


def forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)  # stays one node of the graph; this function runs again beneath it
    if dispatch.wants_autograd(*args[:3]):
        q, k, v, *fields, scale, backend, exact_lse = args
        return _Attention.apply(q, k, v, LoweredMask(*fields), scale, backend, exact_lse, None)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _Attention(torch.autograd.Function):
    """q, k, v -> out, lse: by a plan, with a mask prepared for it, lse only where it is wanted; or by the ops."""

    @staticmethod
    def forward(ctx, q, k, v, mask: Prepared | LoweredMask, scale: float, backend: str, exact_lse: bool, plan):
        ctx.set_materialize_grads(False)
        if isinstance(mask, Prepared):
            out, lse = plan(q, k, v, mask)
            ctx.save_for_backward(q, k, v, out, lse, *mask.tensors)
            ctx.request = mask, scale, backend
            return (out, lse) if exact_lse else out
        with dispatch.below_autograd():
            out, lse = _FORWARD(q, k, v, *mask, scale, backend, exact_lse)
        ctx.save_for_backward(q, k, v, out, lse, *(getattr(mask, name) for name in _TENSORS))
        ctx.request = mask._replace(**dict.fromkeys(_TENSORS)), scale, backend
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        given, (mask, scale, backend) = (dout, dlse, q, k, v, out, lse), ctx.request
        if not isinstance(mask, Prepared):
            fields = mask._replace(**dict(zip(_TENSORS, tensors, strict=True)))
            grads = dispatch.call_backward(_BACKWARD, *given, *fields, scale, backend)
        else:
            grads = gradients(*given, mask, scale, backend)
        return (*grads, None, None, None, None, None)


def _backward(dout, dlse, q, k, v, out, lse, *rest):
    *fields, scale, backend = rest
    return backward_by_plan(dout, dlse, q, k, v, out, lse, Prepared(LoweredMask(*fields)), scale, backend)


def _backward_fake(dout, dlse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _backward_autograd(*args):
    return dispatch.call_backward(_BACKWARD, *args)


_FORWARD = dispatch.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_REQUEST}, bool exact_lse) -> (Tensor, Tensor)",
    _forward, _forward_fake, forward_autograd,
)  # fmt: skip
_BACKWARD = dispatch.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_REQUEST}) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _backward_autograd,
)  # fmt: skip


# Plans

UNWANTED, SAVED, EXACT = range(3)  # the log-sum-exp: for nobody, for the backward, for the caller
SCALES = (type(None), int, float)  # what a key may hold
NO_MASK = Prepared(LoweredMask())
_record = super(torch.autograd.Function, _Attention).apply  # less what transforms need, for which nothing may be direct


def forward_by_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    return plan_of(q, k, v, mask, scale, backend, lse)(q, k, v, mask)


def plan_of(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    """(q, k, v, mask) -> out, lse or None."""
    key = forward_key(q, k, v, mask, scale, backend, lse)
    return PLANS.get(key) or keep(key, _forward_plan(q, k, v, mask, scale, backend, lse))


def forward_key(q, k, v, mask: Prepared, scale: float | None, backend: str, lse: Any) -> tuple:
    """q, k, v: (B, H, L, D), or with a packing (T, H, D); no plan knows how many rows a packing has."""
    if not mask.packed:
        sizes: Any = q.shape, k.shape, v.shape
    else:
        sizes = tuple((x.shape[-3 if x.dim() == 4 else -2], x.shape[-1], x.dim()) for x in (q, k, v))
    dtype = q.dtype
    return (
        sizes, q.stride(), k.stride(), v.stride(), dtype, k.dtype, v.dtype, q.device, k.get_device(), v.get_device(), mask.key,
        scale, backend, lse, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 and unaligned(q, k, v), fp32_precision(dtype),
    )  # fmt: skip


def _forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    if not all(x.stride(-1) == 1 for x in (q, k, v)):
        plan = _unit_forward_plan(_unit_stride(q), _unit_stride(k), _unit_stride(v), mask, scale, backend, lse)
        return lambda q, k, v, mask: plan(*map(_unit_stride, (q, k, v)), mask)
    return _unit_forward_plan(q, k, v, mask, scale, backend, lse)


def _unit_forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    module = dispatch.choose("attention", BACKENDS, backend, problem_of(batched(q), batched(k), batched(v), mask.fields))
    if hasattr(module, "forward_plan"):
        return module.forward_plan(q, k, v, mask, scale, lse == EXACT, lse != UNWANTED)
    if q.dim() == 4:
        return lambda q, k, v, mask: module.forward(q, k, v, mask.fields, scale, lse == EXACT)

    def packed(q, k, v, mask):
        out, statistics = module.forward(batched(q), batched(k), batched(v), mask.fields, scale, lse == EXACT)
        return out[0].transpose(0, 1), statistics[0]

    return packed


def gradients(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool = False) -> Any:
    """dq, dk and dv by a plan, or, where something watches, by the op. joined: side by side, as one matrix (tokens, 3 H D)."""
    given = dout, dlse, q, k, v, out, lse
    if not torch.is_grad_enabled() and not watched() and plain_types(*given):
        return backward_by_plan(*given, mask, scale, backend, joined)
    grads = dispatch.call_backward(_BACKWARD, *_batched(*given), *mask.fields, scale, backend)
    if joined:
        return side_by_side(*grads)
    return grads if q.dim() == 4 else tuple(grad[0].transpose(0, 1) for grad in grads)


def backward_by_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool = False):
    given = dout, dlse, q, k, v, out, lse
    address = dout.data_ptr() | out.data_ptr() | lse.data_ptr() | (0 if dlse is None else dlse.data_ptr())
    key = (
        forward_key(q, k, v, mask, scale, backend, dout.stride()), dout.dtype, out.stride(), lse.is_contiguous(),
        None if dlse is None else dlse.is_contiguous(), joined, address & 15 and unaligned(dout, out, lse, dlse),
    )  # fmt: skip
    plan = PLANS.get(key) or keep(key, _backward_plan(*given, mask, scale, backend, joined))
    return plan(*given, mask)


def _backward_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool):
    given = dout, dlse, q, k, v, out, lse
    if lse.is_contiguous() and (dlse is None or dlse.is_contiguous()) and all(x.stride(-1) == 1 for x in (dout, q, k, v, out)):
        return _unit_backward_plan(given, mask, scale, backend, joined)
    plan = _unit_backward_plan(_laid_out(*given), mask, scale, backend, joined)
    return lambda *given: plan(*_laid_out(*given[:-1]), given[-1])


def _laid_out(dout, dlse, q, k, v, out, lse) -> tuple:
    dout, q, k, v, out = map(_unit_stride, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse.contiguous()


def _unit_backward_plan(given: tuple, mask: Prepared, scale: float, backend: str, joined: bool):
    _, _, q, k, v, _, _ = given
    module = dispatch.choose("attention", BACKENDS, backend, problem_of(batched(q), batched(k), batched(v), mask.fields))
    if hasattr(module, "joined_results") and joined:
        return module.backward_plan(*given, mask, scale, joined)
    if joined:
        plan = _unit_backward_plan(given, mask, scale, backend, False)
        return lambda *given: side_by_side(*plan(*given))
    if hasattr(module, "backward_plan"):
        return module.backward_plan(*given, mask, scale)
    if q.dim() == 4:
        return lambda *given: module.backward(*given[:-1], given[-1].fields, scale)

    def packed(*given):
        grads = module.backward(*_batched(*given[:-1]), given[-1].fields, scale)
        return tuple(grad[0].transpose(0, 1) for grad in grads)

    return packed


def _batched(dout, dlse, q, k, v, out, lse) -> tuple:
    """Packed tensors, (T, H, D) and (H, T), as those of one sequence, (1, H, T, D) and (1, H, T)."""
    if q.dim() == 4:
        return dout, dlse, q, k, v, out, lse
    dout, q, k, v, out = map(batched, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse[None], q, k, v, out, lse[None]


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but read the last dimension as adjacent elements. (Of one element any stride is right, but
    PyTorch's CPU kernel lays its output out by it.)"""
    if x.stride(-1) == 1:
        return x
    return x.resolve_neg().as_strided(x.shape, (*x.stride()[:-1], 1)) if x.shape[-1] == 1 else x.contiguous()


def direct(q, k, v, mask: Any, scale: float | None, backend: str, return_lse: bool, checked_scale: float | None = None) -> Any:
    """out, or (out, lse), without the dispatcher; nothing watches. None where no such call was checked before and this one was
    not either (`checked_scale` is None), and where a tensor is not plain."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return None
    if mask is None:
        mask = NO_MASK
    elif type(mask) is not Prepared:
        mask = mask.prepared.get((q.shape, k.shape, q.device)) if type(mask) is Mask else None
        if mask is None:
            return None
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    lse = EXACT if return_lse else SAVED if recorded else UNWANTED
    key = forward_key(q, k, v, mask, scale, backend, lse)
    plan = PLANS.get(key)
    if plan is None:
        if checked_scale is None:
            return None
        plan = keep(key, _forward_plan(q, k, v, mask, checked_scale, backend, lse))
    if recorded:
        return _record(q, k, v, mask, _scale(q, scale), backend, return_lse, plan)
    found = plan(q, k, v, mask)
    return found if return_lse else found[0]


# Public functions


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, bias: Tensor | None = None, scale: float | None = None,
    dropout: float = 0.0, seed: int | Tensor | None = None, return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None = None, *, bias: Tensor | None = None, scale: float | None = None,
    dropout: float = 0.0, seed: int | Tensor | None = None, return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused multi-head attention, softmax(scale q k^T + mask) v, differentiable in q, k and v.

    Args:
        q: (B, H, M, D), any strides; fp16, bf16, fp32, or fp64 (backends `eager` and `cpu`).
        k: (B, Hkv, N, D), v: (B, Hkv, N, Dv), q's dtype and device. H is a multiple of Hkv; query head h reads head
            h // (H / Hkv): grouped-query attention, and multi-query attention where Hkv = 1.
        mask: a `masks.Mask`, a bool tensor broadcastable to (B, H, M, N) with True = may attend, or None.
        bias, dropout, seed: not served yet; anything but the default raises NotImplementedError.
        scale: any finite float; default D ** -0.5.
        return_lse: also return the natural log-sum-exp of the masked scores, (B, H, M) in fp32 (fp64 for fp64 inputs);
            it is differentiable.
        backend: "auto", or one of "triton", "cuda", "cpu", "eager"; a named backend never falls back.

    Returns:
        out (B, H, M, Dv) in q's dtype, in (B, M, H, Dv) memory; or (out, lse). A query with no visible key has output 0,
        lse -inf and gradients 0. A key hidden from every query of its sequence by `padding` or `key_padding` may hold NaN.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: no backend, or not the named one, serves the request; its reasons are in the message.
        A second derivative and forward-mode differentiation raise too.

    The algorithm is the online softmax of FlashAttention (Dao et al., 2022, arXiv:2205.14135).
    """
    quiet = bias is None and dropout == 0.0 and seed is None and not watched()
    if quiet and (found := direct(q, k, v, mask, scale, backend, return_lse)) is not None:
        return found
    q, k, v, lowered, checked_scale = checked(q, k, v, mask, bias, scale, dropout, seed, backend)
    if quiet and plain(q, k, v) and type(scale) in SCALES:
        prepared = Prepared(lowered)
        if type(mask) is Mask:
            mask.keep_prepared((q.shape, k.shape, q.device), prepared)
        return direct(q, k, v, prepared, scale, backend, return_lse, checked_scale)
    out, lse = forward_autograd(q, k, v, *lowered, checked_scale, backend, return_lse)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    verbose: bool = False,
) -> dispatch.Explanation:
    """Which backend `attention` would take for these arguments, and why not the others. Runs no kernel.

    `return_lse` is taken so that a call can be explained as it stands; the choice does not depend on it. `verbose` adds, for
    backends with kernels of their own, each kernel's config, the tiles that it visits under this mask, FLOPs and bytes beside the
    least possible, and the time that an H100 needs at least; for that it reads the mask's tensors.
    """
    q, k, v, lowered, _ = checked(q, k, v, mask, bias, scale, dropout, seed, backend)
    problem = problem_of(q, k, v, lowered)
    notes = [
        f"{name} has a last stride of {x.stride(-1)} and is copied"
        for name, x in (("q", q), ("k", k), ("v", v))
        if x.stride(-1) != 1 and x.shape[-1] != 1
    ]
    explanation = dispatch.explain("attention", BACKENDS, problem, backend, notes)
    if not verbose or explanation.backend == "none":
        return explanation
    return replace(explanation, details=_details(explanation.backend, problem, lowered))


def _details(backend: str, problem: AttentionProblem, mask: LoweredMask) -> list[str]:
    """Of forward and backward, what the backend's kernels would do."""
    module = dispatch.backend_module("attention", backend)
    if not hasattr(module, "plan"):
        return ["computed by PyTorch: no tiles to count"]
    lines = []
    for name, backward in (("forward", False), ("backward", True)):
        lines += [
            f"{name}:",
            *(f"  {line}" for line in plans.work(module.plan(problem, backward), mask, problem, backward).lines()),
        ]
    return lines


def checked(q, k, v, mask, bias, scale, dropout, seed, backend) -> tuple[Tensor, Tensor, Tensor, LoweredMask, float]:
    """q, k, v, mask and scale from the public arguments: checked, cast for autocast, with defaults, the mask lowered if it is
    not."""
    if bias is not None or dropout != 0.0 or seed is not None:
        name = "bias" if bias is not None else "seed" if seed is not None else "dropout"
        raise NotImplementedError(f"{name} is not served yet: leave it at its default")
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
