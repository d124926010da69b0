"""The activations of `linear` and `ffn`: the one list of their names, each with its derivative, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def dgelu(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def dgelu_tanh(z: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def dquick_gelu(z: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return s + 1.702 * z * s * (1 - s)


def drelu(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def dsilu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# name: (function, derivative), both of the pre-activation z; the derivative is evaluated in fp32 or fp64
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (gelu, dgelu),
    "gelu_tanh": (gelu_tanh, dgelu_tanh),
    "quick_gelu": (quick_gelu, dquick_gelu),
    "relu": (F.relu, drelu),
    "silu": (F.silu, dsilu),
}


def check_activation(name: str | None) -> None:
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {name!r}")
