"""The cpu backend of dropout's draw: C++ where it was built (`fastattn._cpu`), else plain PyTorch, equal bit by bit."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fastattn import dropout
from fastattn.dropout import threshold
from fastattn.lowering import LoweredMask

FARTHEST = 2**40  # no j - i is
TENSORS = ("prefix", "key_begin", "key_end", "query_end", "query_starts", "key_starts")

try:
    compiled = importlib.import_module("fastattn._cpu")
except ImportError:
    compiled = None


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def attention_bits(seed: Tensor, rows: int, B: int, H: int, M: int, N: int, p: float, mask: LoweredMask) -> Tensor:
    """Of which only what the mask's bounds leave is written."""
    packed = mask.query_starts is not None
    if compiled is None:
        if packed:
            return dropout.packed_kept_bits(seed, mask.query_starts, rows, H, N, p)
        return dropout.kept_bits(seed, B, H, M, N, p)
    words = -(-N // 32)
    bits = seed.new_empty((H, rows, words) if packed else (B, H, M, words), dtype=torch.int32)
    given = (getattr(mask, name) for name in TENSORS)
    tensors = [None if x is None else x.contiguous() for x in given]
    compiled.attention_bits(
        bits.data_ptr(), *(0 if x is None else x.data_ptr() for x in tensors), rows, B, H, M, N,
        -FARTHEST if mask.low is None else max(mask.low, -FARTHEST), FARTHEST if mask.high is None else min(mask.high, FARTHEST),
        0 if mask.prefix_high is None else mask.prefix_high, seed.item(), threshold(p), torch.get_num_threads(),
    )  # fmt: skip
    return bits


def kept_elements(seed: Tensor, rows: int, columns: int, p: float, tag: int) -> Tensor:
    """Which elements an op of two dimensions keeps: bool (rows, columns); `tag` says which op."""
    if compiled is None:
        return dropout.kept_elements(seed, rows, columns, p, tag)
    kept = seed.new_empty((rows, columns), dtype=torch.bool)
    compiled.kept_elements(kept.data_ptr(), rows, columns, seed.item(), threshold(p), tag, torch.get_num_threads())
    return kept
