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
    if problem.Dv != problem.D:
        reasons.append(f"v has head dimension {problem.Dv} and q {problem.D}: the CUDA kernels take equal ones")
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
    mask_argument, mask_tensors = _mask(mask)
    arguments = {
        **{name: _heads(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        "lse": lse.data_ptr(),
        "mask": mask_argument,
        "scale": scale,
        "sizes": (B, H, k.shape[1], M, N, D),
        "bfloat16": q.dtype == torch.bfloat16,
        "aligned": library.rows_aligned(q, k, v),
    }
    library.launch("attention_forward", arguments, {"q": q, "k": k, "v": v, **mask_tensors}, {"out": out, "lse": lse})
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grads = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, scale)
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2).copy_(x) for x in grads)  # in (B, L, H, D) memory
    return dq, dk, dv


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (B, H, L, D) tensor, as the binding takes them."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _mask(mask: LoweredMask) -> tuple[tuple, dict[str, Tensor]]:
    """The mask as the binding takes it, and its tensors, whose addresses stand in it."""
    tensors = {name: x for name, x in mask._asdict().items() if isinstance(x, Tensor)}
    for name in ("prefix", "key_begin", "key_end", "query_end"):
        if name in tensors:
            tensors[name] = tensors[name].contiguous()

    def strided(name: str, dimensions: int) -> tuple[int, ...]:
        x = tensors.get(name)
        if x is None:
            return (0,) * (dimensions + 1)
        strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return (x.data_ptr(), *strides)[: dimensions + 1]

    vectors = (library.address(tensors.get(name)) for name in ("prefix", "key_begin", "key_end", "query_end"))
    matrices = (strided(name, 2) for name in ("keys", "ids", "key_ids"))
    tiles = (strided(name, 3) for name in ("key_tiles", "query_tiles"))
    return (mask.low, mask.high, mask.prefix_high, *vectors, *matrices, strided("bits", 4), *tiles), tensors
