"""`attention`: problem, schema, fake, autograd, public functions.

Calls go attention -> op (or autograd Function around it) -> `choose` -> kernels/<backend>/attention.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastattn import masks, plans
from fastattn.lowering import LoweredMask
from fastattn.masks import Mask
from fastattn.ops import dispatch
from fastattn.packing import readable

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


def _problem(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> AttentionProblem:
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
_NO_GRADIENTS = (None,) * (len(LoweredMask._fields) + 3)  # mask, scale, backend, exact_lse


def _forward(q, k, v, *rest):
    *fields, scale, backend, exact_lse = rest
    mask = LoweredMask(*fields)
    problem = _problem(q, k, v, mask)
    module = dispatch.choose("attention", BACKENDS, backend, problem)
    return module.forward(_unit_stride(q), _unit_stride(k), _unit_stride(v), mask, scale, exact_lse)


def _forward_fake(q, k, v, *rest):
    B, H, M, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, M, H, v.shape[3]).transpose(1, 2), q.new_empty(B, H, M, dtype=lse_dtype)


def forward_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _FORWARD(*args)  # stays one node of the graph; this function runs again beneath it
    if dispatch.wants_autograd(*args[:3]):
        return _Attention.apply(*args)
    with dispatch.below_autograd():
        return _FORWARD(*args)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        q, k, v, *fields, scale, backend, _ = args
        mask = LoweredMask(*fields)
        with dispatch.below_autograd():
            out, lse = _FORWARD(*args)
        ctx.save_for_backward(q, k, v, out, lse, *(getattr(mask, name) for name in _TENSORS))
        ctx.mask = mask._replace(**dict.fromkeys(_TENSORS))
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        mask = ctx.mask._replace(**dict(zip(_TENSORS, tensors, strict=True)))
        grads = dispatch.call_backward(_BACKWARD, dout, dlse, q, k, v, out, lse, *mask, ctx.scale, ctx.backend)
        return (*grads, *_NO_GRADIENTS)


def _backward(dout, dlse, q, k, v, out, lse, *rest):
    *fields, scale, backend = rest
    mask = LoweredMask(*fields)
    problem = _problem(q, k, v, mask)
    module = dispatch.choose("attention", BACKENDS, backend, problem)
    return module.backward(
        _unit_stride(dout), dlse, _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(out), lse, mask, scale
    )


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


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but read the last dimension as adjacent elements. (Of one element any stride is right, but
    PyTorch's CPU kernel lays its output out by it.)"""
    if x.stride(-1) == 1:
        return x
    return x.as_strided(x.shape, (*x.stride()[:-1], 1)) if x.shape[-1] == 1 else x.contiguous()


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
    args = op_arguments(q, k, v, mask, bias, scale, dropout, seed, backend)
    out, lse = forward_autograd(*args, return_lse)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, served by fastattn.

    query (..., H, M, D), key and value (..., H, N, D) with equal leading dimensions; a bool attn_mask broadcastable to
    (..., M, N), True = may attend; is_causal is top-left and excludes attn_mask. enable_gqa=True lets key and value have fewer
    heads, of which query's number is a multiple. A float attn_mask is a bias; one of 0 and -inf alone, which
    nn.MultiheadAttention makes of a bool one, is served on CPUs, where its values can be read. Any other and dropout_p > 0 are
    not served yet and raise NotImplementedError. The result has the strides that torch's function gives on a CPU: its
    dimensions lie in memory in the query's order where torch's fused kernel would serve the call, else it is contiguous.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other: set one of them")
    keep = None if attn_mask is None else visible_pairs(attn_mask, query)
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        dims = f"{query.dim()}, {key.dim()}, {value.dim()}"
        raise ValueError(f"query, key and value need the same number of dimensions, at least 2; got {dims}")
    if not enable_gqa and key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        raise ValueError(f"key has {key.shape[-3]} heads and query {query.shape[-3]}; that needs enable_gqa=True")
    lead = query.shape[:-2]
    mask: Mask | Tensor | None = masks.causal("top_left") if is_causal else None
    if keep is not None:
        mask = keep if query.dim() == 4 else _four_dimensions(keep.expand(*lead, *keep.shape[-2:]))
    q, k, v = (_four_dimensions(x) for x in (query, key, value))
    out = attention(q, k, v, mask, scale=scale, dropout=dropout_p)
    if query.dim() != 4:
        out = out.reshape(*lead, *out.shape[-2:])
    return _laid_out_as_by_torch(out, query, key, value, attn_mask)


def visible_pairs(attn_mask: Tensor, query: Tensor) -> Tensor:
    """attn_mask as a bool tensor, True = may attend. Raises NotImplementedError for floats other than 0 and -inf, and for floats
    that the host cannot read at once: nothing is guessed, and no GPU is waited for."""
    if attn_mask.dtype == torch.bool:
        return attn_mask
    refusal = f"attn_mask of dtype {attn_mask.dtype} is a bias, which is not served yet; pass a bool mask"
    cast = attn_mask.dtype in DTYPES[:3] and dispatch.autocast_dtype(query) is not None
    alike = attn_mask.dtype == query.dtype or cast
    if not attn_mask.is_floating_point() or attn_mask.requires_grad or not alike:
        raise NotImplementedError(refusal)
    if not _has_values(attn_mask):
        raise NotImplementedError(
            f"{refusal}. (Whether it is 0 and -inf alone, as nn.MultiheadAttention makes it of a bool mask, is looked at on CPUs "
            "only, and not in a trace: call fastattn.attention on the layer's projections, with "
            "masks.key_padding(~key_padding_mask))"
        )
    keep = attn_mask == 0
    if not bool((keep | (attn_mask == -math.inf)).all()):
        raise NotImplementedError(refusal)
    repeated = keep.dim() == query.dim() == 4 and keep.shape[1] == query.shape[1] and keep.shape[2] == 1
    if repeated and torch.equal(keep, keep[:, :1].expand_as(keep)):
        return keep[:, :1]  # padding, which nn.MultiheadAttention repeats for each head
    return keep


def _has_values(x: Tensor) -> bool:
    """Whether the host can read x without waiting, and what it reads will be true of the next run as well."""
    if not readable(x) or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active() and not torch._C._len_torch_dispatch_stack()


def _laid_out_as_by_torch(out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """`out`, whose memory is (B, M, H, Dv), in the layout of torch's result: a `.view` that works there works here."""
    fused = (
        query.dim() == 4
        and out.shape == query.shape
        and key.shape[2] > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (attn_mask is None or attn_mask.dim() != 3)
    )
    if not fused or query.is_contiguous():
        return out.contiguous()
    B, H, M, _ = query.stride()
    if B >= M >= H > 0:
        return out  # the query too is (B, M, H, D) in memory: how models make it
    like = torch.empty_like(query, device="meta")
    return out.new_empty_strided(out.shape, like.stride()).copy_(out)


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
    q, k, v, *lowered, _, _ = op_arguments(q, k, v, mask, bias, scale, dropout, seed, backend)
    lowered_mask = LoweredMask(*lowered)
    problem = _problem(q, k, v, lowered_mask)
    notes = [
        f"{name} has a last stride of {x.stride(-1)} and is copied"
        for name, x in (("q", q), ("k", k), ("v", v))
        if x.stride(-1) != 1 and x.shape[-1] != 1
    ]
    explanation = dispatch.explain("attention", BACKENDS, problem, backend, notes)
    if not verbose or explanation.backend == "none":
        return explanation
    return replace(explanation, details=_details(explanation.backend, problem, lowered_mask))


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


def op_arguments(q, k, v, mask, bias, scale, dropout, seed, backend) -> tuple:
    """The op's arguments from the public ones: checked, cast for autocast, defaults filled in, the mask lowered if it is not."""
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
    B, H, M, D = q.shape
    N = k.shape[2]
    if scale is None:
        scale = D**-0.5 if D else 1.0
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {scale}")
    if mask is None:
        mask = LoweredMask()
    elif not isinstance(mask, LoweredMask):
        mask = lower_mask(mask, B, H, M, N, q.device)
    return (q, k, v, *mask, scale, backend)


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


def _four_dimensions(x: Tensor) -> Tensor:
    """(..., H, L, D) with any leading dimensions, or none, as (B, H, L, D)."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    return x.flatten(0, x.dim() - 4)
