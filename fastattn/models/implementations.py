"""The computations that the models are made of, in the three implementations that they can be built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.activations import ACTIVATIONS
from fastattn.packing import Packing


class Ops(NamedTuple):
    """What a model calls. Mix them with `_replace` to see what each part gives, for example fastattn's attention alone:

    `IMPLEMENTATIONS["sdpa"]._replace(mask=IMPLEMENTATIONS["fastattn"].mask, attention=IMPLEMENTATIONS["fastattn"].attention)`
    """

    mask: Callable[..., Any]  # (keep (B, N) bool or None, causal, N, device, packing=None) -> what its `attention` takes
    attention: Callable[..., Tensor]  # (q, k, v (B, N, H, D), or (T, H, D) of a packing, mask, dropout) -> as q
    linear: Callable[..., Tensor]  # (x, weight, bias, *, activation=None)
    ffn: Callable[..., Tensor]  # (x, w1, b1, w2, b2, *, activation)
    add_layer_norm: Callable[..., Any]  # (x, residual or None, weight, bias, *, eps, dropout=0.0 of x, return_sum=False)


def choose(implementation: str | Ops) -> Ops:
    if isinstance(implementation, Ops):
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, or an Ops; got {implementation!r}")
    return IMPLEMENTATIONS[implementation]


# Hugging Face's names of activations that have one of ours for an equal
HIDDEN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_of(hidden_act: str) -> str:
    if hidden_act not in HIDDEN_ACTIVATIONS:
        raise NotImplementedError(f"hidden_act {hidden_act!r} is not served: use one of {', '.join(HIDDEN_ACTIVATIONS)}")
    return HIDDEN_ACTIVATIONS[hidden_act]


# fastattn


def _fastattn_mask(
    keep: Tensor | None, causal: bool, N: int, device: torch.device, packing: Packing | None = None
) -> tuple[Packing | None, masks.Mask | None]:
    padding = None if keep is None else masks.key_padding(keep)
    if causal:
        padding = masks.causal() if padding is None else masks.causal() & padding
    return packing, padding


def _fastattn_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: tuple[Packing | None, masks.Mask | None], dropout: float
) -> Tensor:
    packing, visible = mask
    if packing is not None:
        return fastattn.varlen_attention(q, k, v, packing, visible, dropout=dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return fastattn.attention(q, k, v, visible, dropout=dropout).transpose(1, 2)


# PyTorch: `visible` is a bool tensor that broadcasts to (B, H, N, N), True = may attend. It has no attention of packed sequences:
# they are padded for attention, and for nothing else.


def _visible(keep: Tensor | None, causal: bool, N: int, device: torch.device) -> Tensor | None:
    visible = None if keep is None else keep[:, None, None, :]
    if not causal:
        return visible
    band = torch.ones(N, N, dtype=torch.bool, device=device).tril()
    return band[None, None] if visible is None else visible & band


def _eager_mask(
    keep: Tensor | None, causal: bool, N: int, device: torch.device, packing: Packing | None = None
) -> tuple[Packing | None, Tensor | None]:
    if packing is not None:
        keep, N = packing.unpack(torch.ones(packing.capacity, dtype=torch.bool, device=device)), packing.max_length
    return packing, _visible(keep, causal, N, device)


def _sdpa_mask(
    keep: Tensor | None, causal: bool, N: int, device: torch.device, packing: Packing | None = None
) -> tuple[Packing | None, dict[str, Any]]:
    """The mask as keyword arguments of PyTorch's function: its causal flag is faster than a tensor that says the same."""
    if causal and keep is None and packing is None:
        return None, {"is_causal": True}
    packing, visible = _eager_mask(keep, causal, N, device, packing)
    return packing, {"attn_mask": visible}


def _padded(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Ops.attention` made of a function of (B, H, N, D)."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: tuple[Packing | None, Any], dropout: float) -> Tensor:
        packing, visible = mask
        if packing is not None:
            q, k, v = (packing.unpack(x) for x in (q, k, v))
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, dropout).transpose(1, 2)
        return out if packing is None else packing.pack(out)

    return run


def _sdpa_attention(q: Tensor, k: Tensor, v: Tensor, visible: dict[str, Any], dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **visible)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is None:
        weights = scores.softmax(-1)
    else:  # the second fill is for a query with no visible key, whose softmax is NaN
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)
    return F.dropout(weights, dropout) @ v


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = None) -> Tensor:
    z = F.linear(x, weight, bias)
    return z if activation is None else ACTIVATIONS[activation][0](z)


def _torch_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str) -> Tensor:
    return F.linear(_torch_linear(x, w1, b1, activation=activation), w2, b2)


def _torch_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    x = F.dropout(x, dropout)
    total = x if residual is None else residual + x
    y = F.layer_norm(total, (total.shape[-1],), weight, bias, eps)
    return (y, total) if return_sum else y


IMPLEMENTATIONS = {
    "fastattn": Ops(_fastattn_mask, _fastattn_attention, fastattn.linear, fastattn.ffn, fastattn.add_layer_norm),
    "sdpa": Ops(_sdpa_mask, _padded(_sdpa_attention), _torch_linear, _torch_ffn, _torch_add_layer_norm),
    "eager": Ops(_eager_mask, _padded(_eager_attention), _torch_linear, _torch_ffn, _torch_add_layer_norm),
}
