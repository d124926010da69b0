"""The cpu backend of `linear`: oneDNN through PyTorch, with the activation fused into the product.

oneDNN wants its weights in a blocked layout. Without a cache they are packed on every call, in fp32 only: there packing still
beats the other BLAS where that is slow, while PyTorch's own bf16 linear is oneDNN already. Of parameters used without grad
the packed copy is kept, see `fastattn.kept`. Training runs plain linears and saves the pre-activation.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.activations import ACTIVATIONS
from fastattn.dropout import FFN_HIDDEN
from fastattn.kept import kept
from fastattn.kernels.cpu.dropout import kept_elements
from fastattn.reference import activated, drawn, linear_backward

QUICK_GELU = 1.702  # quick_gelu(z) = silu(1.702 z) / 1.702, so in fp32 a weight scaled by it lets oneDNN's silu serve
ONEDNN_ACTIVATIONS = {  # what oneDNN fuses: name and algorithm; any other of ACTIVATIONS comes after the product
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "quick_gelu": ("swish", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def notes(problem) -> list[str]:
    fuses = _fuses(problem.activation, problem.dtype)
    fused = "in inference with the activation fused" if fuses else "the activation after it"
    return [f"the products are PyTorch's: oneDNN where it takes the dtype, {fused}"]


def forward(
    x, weight, bias, residual, activation: str | None, train: bool, seed: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y, and z where `train` asks for it."""
    if train or seed is not None or not _onednn(x, weight):
        z = _plain(x, weight, bias)
        return activated(z, activation, residual, drawn(kept_elements, seed, x, weight.shape[0], dropout, FFN_HIDDEN)), z
    y = _fused(x, weight, bias, activation)
    return (y if residual is None else y + residual), y


def backward(
    dy, x, weight, z, activation: str | None, need_dx: bool, need_dw: bool, need_db: bool,
    before: tuple[Tensor, str] | None = None, seed: Tensor | None = None, dropout: float = 0.0,
):  # fmt: skip
    drop = drawn(kept_elements, seed if need_dx else None, x, x.shape[-1], dropout, FFN_HIDDEN)
    return linear_backward(dy, x, weight, z, activation, need_dx, need_dw, need_db, before, drop)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == torch.bfloat16 and bf16_is_slow():
        return _plain(x.float(), weight.to(x.dtype), bias).to(x.dtype)
    if x.dtype != torch.float32 or not _onednn(x, weight):
        return F.linear(x, weight.to(x.dtype), bias)
    return _pointwise(x, _pack(weight, x.dtype, 1.0), bias, "none", [], "")


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if activation is not None and not _fuses(activation, x.dtype):
        return ACTIVATIONS[activation][0](_fused(x, weight, bias, None))
    if x.dtype == torch.bfloat16 and bf16_is_slow():
        bias = None if bias is None else bias.to(x.dtype)
        return _fused(x.float(), weight.to(x.dtype), bias, activation).to(x.dtype)
    scale = QUICK_GELU if activation == "quick_gelu" else 1.0
    packed = _packed(weight, x.dtype, scale)
    if packed is None and x.dtype != torch.float32:
        z = _plain(x, weight, bias)
        return z if activation is None else ACTIVATIONS[activation][0](z)
    if packed is None:
        packed = _pack(weight, x.dtype, scale)
    if bias is not None:
        bias = (bias * scale).to(x.dtype) if scale != 1.0 else bias.to(x.dtype)
    name, algorithm = ONEDNN_ACTIVATIONS[activation]
    y = _pointwise(x, packed, bias, name, [], algorithm)
    return y if scale == 1.0 else y.mul_(1 / scale)


def _fuses(activation: str | None, dtype: torch.dtype) -> bool:
    """Not quick_gelu in half precision, whose scaled weight would be rounded once more."""
    return activation in ONEDNN_ACTIVATIONS and (activation != "quick_gelu" or dtype == torch.float32)


def _pointwise(*args) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(*args)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's prepacked linear takes this: fp32, or bf16 on a CPU with the instructions for it, and nothing empty."""
    return x.numel() > 0 and weight.numel() > 0 and _onednn_takes(x.dtype)


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def bf16_is_slow() -> bool:
    """Whether bf16 is better multiplied in fp32 and rounded at the end, which costs no accuracy.

    On Intel processors without AMX: there oneDNN's bf16 products took 1.8 times as long as those of fp32 (958 x 768 by 768 x 3072
    on a Xeon with avx512_bf16, 2 threads).
    """
    try:
        with open("/proc/cpuinfo") as file:
            intel = any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:
        return False
    return intel and not torch.cpu._is_amx_tile_supported()


def _pack(weight: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    weight = weight.detach() if scale == 1.0 else weight.detach() * scale
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))


def _packed(weight: Tensor, dtype: torch.dtype, scale: float) -> Tensor | None:
    """The packed copy of a weight that may be kept, else None."""
    return kept([weight], ("packed", dtype, scale), lambda: _pack(weight, dtype, scale))
