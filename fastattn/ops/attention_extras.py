"""What `attention` and `varlen_attention` make of `bias`, `dropout` and `seed`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.biases import Bias, check_dtype
from fastattn.dropout import seed_for
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask
from fastattn.ops.dropout import BACKENDS, attention_bits


def extras_of(
    bias: Any, dropout: float, seed: int | Tensor | None, q: Tensor, k: Tensor, mask: LoweredMask, backend: str
) -> Extras:
    """The bias checked, and the bits of the weights that are kept, drawn now. Without either NO_EXTRAS itself."""
    sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if mask.query_starts is not None:
        assert mask.max_queries is not None and mask.max_keys is not None
        sizes = mask.query_starts.shape[0] - 1, q.shape[1], mask.max_queries, mask.max_keys
    extras = bias_extras(bias, sizes, q)
    drawn = seed_for(dropout, seed, q.device)
    if drawn is None:
        return extras
    drawn_by = backend if backend in BACKENDS else "auto"  # one that draws none refuses dropout itself, in its own words
    kept = attention_bits(drawn, q.shape[2], *sizes, dropout, mask, drawn_by)
    return extras._replace(kept=kept, dropout=float(dropout))


def bias_extras(bias: Any, sizes: tuple[int, int, int, int], q: Tensor) -> Extras:
    """sizes: (B, H, M, N), of packed sequences how many they are and the greatest lengths."""
    if bias is None:
        return NO_EXTRAS
    if isinstance(bias, Bias):
        bias.check(*sizes[:2], q)
        return bias.extras()
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, one of fastattn.biases or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be of floating point numbers, got {bias.dtype}; a bool tensor is a mask")
    check_dtype(bias, q, "bias")
    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, but q is on {q.device}")
    given = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(given) != 4 or any(size not in (1, whole) for size, whole in zip(given, sizes, strict=True)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, which does not broadcast to (B, H, M, N) = {tuple(sizes)}")
    return Extras(bias if bias.dim() == 4 else bias.reshape(given))
