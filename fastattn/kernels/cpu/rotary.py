"""The cpu backend of `rotary`: plain PyTorch that writes the two halves of a head where they are to be.

Half precision is widened once a tensor, and rounded by the copy into the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.lowering import head_memory
from fastattn.reference import compute_dtype, pairs


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q.dtype)
    cos, sin = (table.to(dtype).unsqueeze(-3 if q.dim() == 4 else -2) for table in (cos, sin))
    return _turned(q, cos, sin, interleaved, inverse), _turned(k, cos, sin, interleaved, inverse)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    out, R, sign = head_memory(x), 2 * cos.shape[-1], -1 if inverse else 1
    first, second = pairs(x[..., :R].to(cos.dtype), interleaved)
    to_first, to_second = pairs(out[..., :R], interleaved)
    to_first.copy_(torch.mul(first, cos).addcmul_(second, sin, value=-sign))
    to_second.copy_(torch.mul(second, cos).addcmul_(first, sin, value=sign))
    out[..., R:] = x[..., R:]
    return out
