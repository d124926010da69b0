"""The cuda backend of attention: the CUDA C++ kernel of csrc/attention forward, the specification's formulas backward for now."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels.cuda import library
from fastattn.lowering import LoweredMask

HEAD_DIMS = (32, 64, 128)
INT32_MAX = 2**31 - 1


def unsupported(problem) -> list[str]:
    reasons = library.problems(problem.device)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{problem.dtype} is not served: the CUDA kernels take fp16 and bf16")
    if problem.D not in HEAD_DIMS:
        reasons.append(f"head dimension {problem.D} is not 32, 64 or 128")
    if problem.pairs:
        reasons.append("a dense mask is not served yet")
    if max(problem.B, problem.H, problem.M, problem.N) > INT32_MAX:
        reasons.append("a size is beyond 2^31 - 1")
    return reasons


def notes(problem) -> list[str]:
    return ["the backward pass is plain PyTorch with M x N scores in memory; its CUDA kernel is not there yet"]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    B, H, M, D = q.shape
    N = k.shape[2]
    out = q.new_empty(B, M, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    vectors = {name: getattr(mask, name) for name in ("key_begin", "key_end", "query_end")}
    vectors = {name: None if x is None else x.contiguous() for name, x in vectors.items()}
    keys = mask.keys
    arguments = {
        **{name: _heads(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        **{name: library.address(x) for name, x in vectors.items()},
        "lse": lse.data_ptr(),
        "keys": (0, 0, 0) if keys is None else (keys.data_ptr(), *keys.stride()),
        "diagonal": mask.diagonal,
        "scale": scale,
        "sizes": (B, H, M, N, D),
        "bfloat16": q.dtype == torch.bfloat16,
        "aligned": library.rows_aligned(q, k, v),
    }
    library.launch("attention_forward", arguments, {"q": q, "k": k, "v": v, "keys": keys, **vectors}, {"out": out, "lse": lse})
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grads = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, scale)
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2).copy_(x) for x in grads)  # in (B, L, H, D) memory
    return dq, dk, dv


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (B, H, L, D) tensor, as the binding takes them."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row
