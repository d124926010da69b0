"""The eager backend of attention's dropout bits: the draw in plain PyTorch, on any device."""

from __future__ import annotations

from torch import Tensor

from fastattn.dropout import kept_bits, packed_kept_bits
from fastattn.lowering import LoweredMask


def unsupported(problem) -> list[str]:
    return []


def attention_bits(seed: Tensor, rows: int, B: int, H: int, M: int, N: int, p: float, mask: LoweredMask) -> Tensor:
    """All of them, whatever the mask hides."""
    if mask.query_starts is None:
        return kept_bits(seed, B, H, M, N, p)
    return packed_kept_bits(seed, mask.query_starts, rows, H, N, p)
