"""The triton backend of attention: what it takes, tile sizes, launches.

Three kernels: `_attention_forward_kernel` in attention_forward.py; `_attention_dq_kernel` and `_attention_dkdv_kernel` in
attention_backward.py. No atomics, so results are deterministic. Lengths, strides and the mask's tensors are run-time
arguments; what is compiled in is the dtype, D, which mask fields there are, and whether rows start at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastattn.kernels.triton.attention_backward import _attention_dkdv_kernel, _attention_dq_kernel
from fastattn.kernels.triton.attention_forward import _attention_forward_kernel
from fastattn.kernels.triton.launch import Launch, precision, refusals, run, vector
from fastattn.lowering import LoweredMask


class Config(NamedTuple):
    """Tile sizes in queries and keys, warps per program, pipeline stages of the loop."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (fp32?, dense mask?, BLOCK_D) -> forward, dq, dkdv. All fit the 99 KB of shared memory of sm_86, sm_89 and sm_120, and none
# spills more than 64 bytes. An IEEE fp32 tl.dot takes small tiles; the tile of a dense mask takes registers of its own.
CONFIGS = {
    (False, False, 16): (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    (False, False, 32): (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    (False, False, 64): (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
    (False, False, 128): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    (False, True, 16): (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    (False, True, 32): (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    (False, True, 64): (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    (False, True, 128): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    **{
        (True, dense, block_d): configs
        for dense in (False, True)
        for block_d, configs in {
            16: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
            32: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
            64: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
            128: (Config(32, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 32, 8, 1)),
        }.items()
    },
}


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    if not 1 <= problem.D <= 128:
        reasons.append(f"head dimension {problem.D} is not in 1..128")
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    B, H, M, D = q.shape
    out = q.new_empty(B, M, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    run(forward_launch(q, k, v, out, lse, mask, scale))
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    B, H, M, D = q.shape
    dq = q.new_empty(B, M, H, D).transpose(1, 2)
    dk, dv = (x.new_empty(B, x.shape[2], H, D).transpose(1, 2) for x in (k, v))
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    dlse = None if dlse is None else dlse.contiguous()
    for launch in backward_launches(dout, dlse, q, k, v, out, lse.contiguous(), delta, dq, dk, dv, mask, scale):
        run(launch)
    return dq, dk, dv


def forward_launch(q, k, v, out, lse, mask: LoweredMask, scale: float) -> Launch:
    config = _configs(q, mask)[0]
    tensors = {"q": q, "k": k, "v": v, "out": out}
    arguments = {**_shared(tensors, mask, scale, q, k), "lse": lse}
    return Launch(_attention_forward_kernel, _programs(q, config.BLOCK_M), arguments, config)


def backward_launches(dout, dlse, q, k, v, out, lse, delta, dq, dk, dv, mask: LoweredMask, scale: float) -> list[Launch]:
    """dq first: it also makes delta = rowsum(dO * O) - dlse, which dkdv reads."""
    _, dq_config, dkdv_config = _configs(q, mask)
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq}
    arguments = {**_shared(tensors, mask, scale, q, k), "lse": lse, "dlse": dlse, "delta": delta}
    first = Launch(_attention_dq_kernel, _programs(q, dq_config.BLOCK_M), arguments, dq_config)
    tensors = {"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv}
    arguments = {**_shared(tensors, mask, scale, q, k), "lse": lse, "delta": delta}
    return [first, Launch(_attention_dkdv_kernel, _programs(k, dkdv_config.BLOCK_N), arguments, dkdv_config)]


def _shared(tensors: dict[str, Tensor], mask: LoweredMask, scale: float, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Arguments that all kernels take: the (B, H, L, D) tensors with their strides, the mask, sizes, what is compiled in."""
    unit = vector(q.element_size(), list(tensors.values()), [stride for x in tensors.values() for stride in x.stride()[:3]])
    arguments: dict[str, Any] = dict(tensors)
    for name, x in tensors.items():
        b, h, length = (stride // unit for stride in x.stride()[:3])
        arguments.update({f"{name}_b": b, f"{name}_h": h, f"{name}_l": length})
    keys_b, keys_n = (0, 0) if mask.keys is None else mask.keys.stride()
    pairs_strides = (0, 0, 0, 0) if mask.pairs is None else _broadcast_strides(mask.pairs)
    arguments.update(zip(("pairs_b", "pairs_h", "pairs_m", "pairs_n"), pairs_strides, strict=True))
    arguments.update(mask._asdict(), keys_b=keys_b, keys_n=keys_n, scale=scale)
    arguments.update(H=q.shape[1], M=q.shape[2], N=k.shape[2])
    arguments.update(D=q.shape[3], BLOCK_D=_block_d(q), VECTOR=unit)
    arguments.update(PRECISION=precision(q.dtype))
    return arguments


def _broadcast_strides(pairs: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(pairs.shape, pairs.stride(), strict=True))


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[3]))


def _configs(q: Tensor, mask: LoweredMask) -> tuple[Config, Config, Config]:
    return CONFIGS[q.dtype == torch.float32, mask.pairs is not None, _block_d(q)]


def _programs(x: Tensor, block: int) -> int:
    """One program per head and block of rows, all on the grid's first axis: the others end at 65,535."""
    return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block)
