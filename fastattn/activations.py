"""The activations of `linear` and `ffn`: the one list of their names, each with its derivative, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(z: Tensor) -> Tensor:
    """z Phi(z), Phi by erf: BERT, RoBERTa, ViT."""
    return F.gelu(z)


def gelu_tanh(z: Tensor) -> Tensor:
    """The tanh approximation of gelu: GPT-2, SigLIP."""
    return F.gelu(z, approximate="tanh")


def quick_gelu(z: Tensor) -> Tensor:
    """z sigmoid(1.702 z): OpenAI's CLIP."""
    return z * torch.sigmoid(1.702 * z)


def dquick_gelu(dy: Tensor, z: Tensor) -> Tensor:
    """dy (s + 1.702 z s (1 - s)) with s = sigmoid(1.702 z), in fp32 for half precision, rounded once."""
    wide = z if z.dtype == torch.float64 else z.float()
    s = torch.sigmoid(1.702 * wide)
    return (s.addcmul_(s * (1 - s), wide, value=1.702) * dy).to(dy.dtype)


aten = torch.ops.aten

# name: (act(z), d(dy, z) = dy act'(z)), both rounded once to the dtype of z
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (gelu, aten.gelu_backward),
    "gelu_tanh": (gelu_tanh, partial(aten.gelu_backward, approximate="tanh")),
    "quick_gelu": (quick_gelu, dquick_gelu),
    "relu": (F.relu, partial(aten.threshold_backward, threshold=0)),
    "silu": (F.silu, aten.silu_backward),
}


# of `ffn` alone: name: the activation of the first half of the columns, by which the second half is multiplied
GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}


def check_activation(name: str | None, gated: bool = False) -> None:
    """Raise ValueError for what is no activation, or no elementwise one, unless those of GATED are allowed too."""
    known = (*ACTIVATIONS, *GATED) if gated else tuple(ACTIVATIONS)
    if name is None or (isinstance(name, str) and name in known):
        return
    if isinstance(name, str) and name in GATED:
        words = f"activation {name!r} multiplies one half of the columns by the other, which only ffn does"
        raise ValueError(f"{words}; here activation must be None or one of {', '.join(known)}")
    raise ValueError(f"activation must be None or one of {', '.join(known)}; got {name!r}")
