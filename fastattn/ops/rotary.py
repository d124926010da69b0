"""`rotary`, the rotary position embedding of queries and keys: schema, fake, autograd, public functions.

The op is its own backward: a gradient is turned by the negative angle, which is `inverse`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import planned
from fastattn.lowering import head_memory
from fastattn.ops import dispatch
from fastattn.packing import int64, integer
from fastattn.planned import PLANS, unaligned

BACKENDS = ("triton", "cpu", "eager")  # in order of preference
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class RotaryProblem:
    """One request, from metadata alone."""

    device: str
    dtype: torch.dtype
    width: int  # the head dimension

    def __str__(self) -> str:
        return f"rotary(D={self.width}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


# The op, of two tensors so that one kernel turns both; either may have no heads.


def _rotary(q, k, cos, sin, interleaved, inverse, backend):
    given = q, k, cos, sin
    first = 1 if q.dim() == 3 else 0  # how many packed tokens there are is no part of the key
    layouts = [(x.shape[first:], x.stride(), x.dtype) for x in given]
    key = "rotary", *layouts, q.device, interleaved, inverse, backend, unaligned(*given)
    plan = PLANS.get(key) or planned.keep(key, _plan(*given, interleaved, inverse, backend))
    return plan(*given)


def _plan(q, k, cos, sin, interleaved, inverse, backend):
    module = dispatch.choose("rotary", BACKENDS, backend, RotaryProblem(q.device.type, q.dtype, q.shape[-1]))
    if hasattr(module, "forward_plan"):
        return module.forward_plan(q, k, cos, sin, interleaved, inverse)
    return lambda q, k, cos, sin: module.forward(q, k, cos, sin, interleaved, inverse)


def _rotary_fake(q, k, cos, sin, interleaved, inverse, backend):
    return head_memory(q), head_memory(k)


def _rotary_autograd(q, k, cos, sin, *options):
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and rotary has none for it: pass {name}.detach()")
    if torch.compiler.is_dynamo_compiling():
        return _ROTARY(q, k, cos, sin, *options)
    if dispatch.wants_autograd(q, k, cos, sin):
        return _Rotary.apply(q, k, cos, sin, *options)
    with dispatch.below_autograd():
        return _ROTARY(q, k, cos, sin, *options)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, inverse, backend):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.options = interleaved, not inverse, backend
        ctx.like = [(x.shape, x.dtype) for x in (q, k)]
        with dispatch.below_autograd():
            return _ROTARY(q, k, cos, sin, interleaved, inverse, backend)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        needs = [need and grad is not None for need, grad in zip(ctx.needs_input_grad, grads, strict=False)]
        if not any(needs):
            return (None,) * 7
        of_any = next(grad for grad in grads if grad is not None)
        given = []
        for grad, need, (shape, dtype) in zip(grads, needs, ctx.like, strict=True):  # what is not needed has no heads
            given.append(grad if need else of_any.new_empty((shape[0], 0, *shape[2:]), dtype=dtype))
        turned = dispatch.call_backward(_ROTARY, *given, cos, sin, *ctx.options)
        return (*(x if need else None for x, need in zip(turned, needs, strict=True)), None, None, None, None, None)


_ROTARY = dispatch.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, str backend) -> (Tensor, Tensor)",
    _rotary, _rotary_fake, _rotary_autograd,
)  # fmt: skip


# Public functions


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of queries and keys, differentiable in both.

    Features are paired, and pair f of token i is turned by the angle whose cosine and sine are cos[i, f] and sin[i, f]:
    (x, y) becomes (x cos - y sin, y cos + x sin).

    Args:
        q: (B, H, L, D), any strides, or packed (T, H, D); fp16, bf16, fp32, or fp64 (backends `eager` and `cpu`).
        k: (B, Hkv, L, D) or (T, Hkv, D), q's dtype and device; of any number of heads.
        cos, sin: (L, R / 2), (1, L, R / 2) or (B, L, R / 2), with packed tokens (T, R / 2), in q's dtype or fp32;
            `rotary_tables` makes them. R, at most D, is how many features of a head are turned, the first ones; those beyond pass
            through (GPT-NeoX's partial rotary embedding). They have no gradient: one that requires it is refused.
        interleaved: which features are a pair. False: f and f + R / 2, as in GPT-NeoX, Llama, ModernBERT, and wherever Hugging
            Face rotates halves; its tables have R columns of which the second half repeats the first: pass cos[..., :R // 2].
            True: the neighbours 2 f and 2 f + 1, as in RoFormer, GPT-J and EVA.
        backend: "auto", "triton", "cpu" or "eager".

    Returns:
        q and k turned, in their dtype; (B, H, L, D) in (B, L, H, D) memory. Computed in fp32 (fp64 for fp64) and rounded once.
        Autocast casts nothing here.

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.
        NotImplementedError: the named backend does not serve the request. Second derivatives raise too.

    >>> q, k = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64)
    >>> turned, turned_keys = fastattn.rotary(q, k, *fastattn.rotary_tables(5, 64))
    >>> torch.equal(turned[:, :, 0], q[:, :, 0]), torch.equal(turned[:, :, 1], q[:, :, 1])  # by place 0 nothing is turned
    (True, False)
    """
    dispatch.check_backend(backend, BACKENDS)
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be True or False, got {interleaved!r}")
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        dispatch.check_tensor(x, name)
    _check_heads(q, k)
    _check_tables(q, cos, sin)
    return _rotary_autograd(q, k, cos, sin, interleaved, False, backend)


def rotary_tables(
    positions: int | Tensor, dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotary`: of the angles position * base^(-2 f / dim), f from 0 to dim / 2 - 1.

    Args:
        positions: how many, for 0, 1, .. on the default device, or a tensor of integers of any shape: (L,), (B, L), or of packed
            tokens `packing.positions`, (T,).
        dim: R, how many features are turned: even.
        base: what later models call theta, > 0.
        dtype: of the tables. Angles, cosines and sines are computed in fp64 and rounded once.

    Returns:
        cos and sin, (*positions, dim / 2).

    Raises:
        ValueError, TypeError: an argument does not fit, in a sentence that names it.

    >>> cos, sin = fastattn.rotary_tables(512, 64)
    >>> cos.shape, cos[0, 0].item(), sin[0, 0].item()
    (torch.Size([512, 32]), 1.0, 0.0)
    """
    if isinstance(positions, Tensor):
        positions = int64(positions, "positions")
    else:
        if integer(positions, "positions") < 0:
            raise ValueError(f"positions must not be negative, got {positions}")
        positions = torch.arange(positions)
    if integer(dim, "dim") < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise ValueError(f"base must be a positive number, got {base!r}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be fp16, bf16, fp32 or fp64, got {dtype}")
    f = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * torch.pow(float(base), -2 * f / dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.dim() not in (3, 4):
        raise ValueError(f"q must have shape (B, H, L, D), or packed (T, H, D); got {tuple(q.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be fp16, bf16, fp32 or fp64, got {q.dtype}")
    if k.dim() != q.dim() or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"k must have q's shape {tuple(q.shape)} but for its heads, dimension 1; got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k is {k.dtype}, but q is {q.dtype}: q and k share one dtype")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device}, but q is on {q.device}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    packed, D = q.dim() == 3, q.shape[-1]
    tokens, named = (q.shape[0], "T") if packed else (q.shape[2], "L")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = f"({named} = {tokens}, R / 2)" + ("" if packed else f" or (B = {q.shape[0]} or 1, L = {tokens}, R / 2)")
        leading = tuple(table.shape[:-1])
        if leading != (tokens,) and (packed or leading not in ((q.shape[0], tokens), (1, tokens))):
            raise ValueError(f"{name} must have shape {expected}, got {tuple(table.shape)}")
        if not 2 <= 2 * table.shape[-1] <= D:
            hint = f": if its second half repeats the first, pass {name}[..., :{table.shape[-1] // 2}]"
            columns = f"{name} has {table.shape[-1]} columns, one for each pair of features, but q has {D} features"
            raise ValueError(columns + (hint if D >= table.shape[-1] > 1 else ""))
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{name} must be {q.dtype} or fp32, got {table.dtype}")
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device}, but q is on {q.device}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        ours, theirs = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (sin, cos))
        raise ValueError(f"sin must be of cos's shape and dtype, {theirs}; got {ours}")
