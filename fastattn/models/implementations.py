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


class Ops(NamedTuple):
    """What a model calls. Mix them with `_replace` to see what each part gives, for example fastattn's attention alone:

    `IMPLEMENTATIONS["sdpa"]._replace(mask=IMPLEMENTATIONS["fastattn"].mask, attention=IMPLEMENTATIONS["fastattn"].attention)`
    """

    mask: Callable[..., Any]  # (keep (B, N) bool or None, causal, N, device) -> what `attention` of the same instance takes
    attention: Callable[..., Tensor]  # (q, k, v (B, H, N, D), mask, dropout) -> (B, H, N, D)
    linear: Callable[..., Tensor]  # (x, weight, bias, *, activation=None)
    ffn: Callable[..., Tensor]  # (x, w1, b1, w2, b2, *, activation)
    add_layer_norm: Callable[..., Any]  # (x, residual or None, weight, bias, *, eps, return_sum=False)


def key_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Hugging Face's attention_mask (B, N), 1 = a real token, as bool.

    Raises TypeError for a float mask, whose 0 may mean either thing, and ValueError for any other shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must hold integers or bools, 1 = a real token; got {attention_mask.dtype}")
    if attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        raise ValueError(f"attention_mask must have the shape (B, N) of input_ids, {shapes}")
    return attention_mask.bool()


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


def _fastattn_mask(keep: Tensor | None, causal: bool, N: int, device: torch.device) -> masks.Mask | None:
    if keep is None:
        return masks.causal() if causal else None
    return masks.causal() & masks.key_padding(keep) if causal else masks.key_padding(keep)


def _fastattn_attention(q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask | None, dropout: float) -> Tensor:
    if dropout > 0:
        raise NotImplementedError(
            "implementation 'fastattn' does not serve dropout of attention probabilities in training yet: set "
            "attention_probs_dropout_prob (BERT) or attention_dropout (CLIP) to 0 in the config, or choose 'sdpa'"
        )
    return fastattn.attention(q, k, v, mask)  # type: ignore[return-value]  # a pair only with return_lse


# PyTorch: `visible` is a bool tensor that broadcasts to (B, H, N, N), True = may attend


def _visible(keep: Tensor | None, causal: bool, N: int, device: torch.device) -> Tensor | None:
    visible = None if keep is None else keep[:, None, None, :]
    if not causal:
        return visible
    band = torch.ones(N, N, dtype=torch.bool, device=device).tril()
    return band[None, None] if visible is None else visible & band


def _sdpa_mask(keep: Tensor | None, causal: bool, N: int, device: torch.device) -> dict[str, Any]:
    """The mask as keyword arguments of PyTorch's function: its causal flag is faster than a tensor that says the same."""
    if causal and keep is None:
        return {"is_causal": True}
    return {"attn_mask": _visible(keep, causal, N, device)}


def _sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: dict[str, Any], dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **mask)


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
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, return_sum: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    y = F.layer_norm(total, (total.shape[-1],), weight, bias, eps)
    return (y, total) if return_sum else y


IMPLEMENTATIONS = {
    "fastattn": Ops(_fastattn_mask, _fastattn_attention, fastattn.linear, fastattn.ffn, fastattn.add_layer_norm),
    "sdpa": Ops(_sdpa_mask, _sdpa_attention, _torch_linear, _torch_ffn, _torch_add_layer_norm),
    "eager": Ops(_visible, _eager_attention, _torch_linear, _torch_ffn, _torch_add_layer_norm),
}
