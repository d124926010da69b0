"""`scaled_dot_product_attention`: PyTorch's signature and layouts around `attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import masks
from fastattn.masks import Mask
from fastattn.ops.attention import attention
from fastattn.packing import readable


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
    heads, of which query's number is a multiple. A float attn_mask, of query's dtype or fp32, is a bias, with a gradient; where
    it is of 0 and -inf alone, which nn.MultiheadAttention makes of a bool one, and its values can be read, what it hides is
    skipped. dropout_p drops weights, drawn from the device's default generator. The result has the strides that torch's function
    gives on a CPU: its dimensions lie in memory in the query's order where torch's fused kernel would serve the call, else it is
    contiguous.

    >>> q, k, v = (torch.randn(2, 4, length, 16) for length in (5, 7, 7))
    >>> theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(fastattn.scaled_dot_product_attention(q, k, v, is_causal=True), theirs, atol=1e-6)
    True
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other: set one of them")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        dims = f"{query.dim()}, {key.dim()}, {value.dim()}"
        raise ValueError(f"query, key and value need the same number of dimensions, at least 2; got {dims}")
    if not enable_gqa and key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        raise ValueError(f"key has {key.shape[-3]} heads and query {query.shape[-3]}; that needs enable_gqa=True")
    lead = query.shape[:-2]
    keep, bias = (None, None) if attn_mask is None else mask_or_bias(attn_mask, query)
    mask: Mask | Tensor | None = masks.causal("top_left") if is_causal else None
    if query.dim() != 4:
        keep, bias = (x if x is None else _four_dimensions(x.expand(*lead, *x.shape[-2:])) for x in (keep, bias))
    q, k, v = (_four_dimensions(x) for x in (query, key, value))
    out = attention(q, k, v, mask if keep is None else keep, bias=bias, scale=scale, dropout=dropout_p)
    if query.dim() != 4:
        out = out.reshape(*lead, *out.shape[-2:])
    unfused = dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)
    return out.contiguous() if unfused else _laid_out_as_by_torch(out, query, key, value, attn_mask)


def mask_or_bias(attn_mask: Tensor, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask as a bool tensor, True = may attend, or as it is, a bias. Floats are looked at where the host can read them at
    once: nothing is guessed, and no GPU is waited for."""
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    if not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or of floating point numbers, got {attn_mask.dtype}")
    if attn_mask.requires_grad or not _has_values(attn_mask):
        return None, attn_mask
    keep = attn_mask == 0
    if not bool((keep | (attn_mask == -math.inf)).all()):
        return None, attn_mask
    repeated = keep.dim() == query.dim() == 4 and keep.shape[1] == query.shape[1] and keep.shape[2] == 1
    if repeated and torch.equal(keep, keep[:, :1].expand_as(keep)):
        return keep[:, :1], None  # padding, which nn.MultiheadAttention repeats for each head
    return keep, None


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


def _four_dimensions(x: Tensor) -> Tensor:
    """(..., H, L, D) with any leading dimensions, or none, as (B, H, L, D)."""
    if x.dim() == 4:
        return x
    if x.dim() < 4:
        return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    return x.flatten(0, x.dim() - 4)
