"""The triton backend of `rotary`: one kernel turns queries and keys, each read and written once.

A program has a block of tokens and some heads of q or of k: it loads the tokens' cosines and sines once for those heads. What is
compiled in is the dtypes, the head dimension, how many features are turned, how they are paired, and whether rows are made of
units of 16 bytes: a gradient is turned back by the kernel of the forward.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.triton import primitives
from fastattn.kernels.triton.launch import Launch, ready, refusals, settle_keys, vector
from fastattn.kernels.triton.primitives import round_to
from fastattn.lowering import head_memory

WIDEST = 1024  # features of a head
VARYING = 7  # parameters of the kernel that differ from call to call: tensors, then the number of tokens


class RotaryConfig(NamedTuple):
    """Tokens and heads of a program, warps."""

    BLOCK_M: int
    HEADS: int
    num_warps: int
    num_stages: int


@triton.jit(
    do_not_specialize=[
        "L", "H", "Hkv", "q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "cos_b", "cos_l", "sin_b", "sin_l", "out_b", "out_l",
        "kout_b", "kout_l", "sign",
    ]
)  # fmt: skip
def _rotary_kernel(
    q, k, cos, sin, out, kout, L, H, Hkv,
    q_b, q_h, q_l, k_b, k_h, k_l, cos_b, cos_l, sin_b, sin_l, out_b, out_l, kout_b, kout_l, sign,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q and out (B, H, L, D), k and kout (B, Hkv, L, D), cos and sin (B, L, HALF), by their strides; a head of out and kout lies
    D elements from the next. A sign of -1 turns back. BLOCK_F and BLOCK_P: room for HALF features, and for those that pass
    through, 0 if there are none.
    """
    groups, key_groups = tl.cdiv(H, HEADS), tl.cdiv(Hkv, HEADS)
    group, tile = tl.program_id(0) % (groups + key_groups), tl.program_id(0) // (groups + key_groups)
    blocks = tl.cdiv(L, BLOCK_M)
    b, i = (tile // blocks).to(tl.int64), (tile % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.arange(0, BLOCK_F)
    live = (i < L)[:, None] & (f < HALF)[None, :]
    c = tl.load(cos + (b * cos_b + i[:, None] * cos_l) * VECTOR + f[None, :], mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + (b * sin_b + i[:, None] * sin_l) * VECTOR + f[None, :], mask=live, other=0.0).to(tl.float32)
    s *= sign
    if group < groups:
        q += b * q_b * VECTOR
        out += b * out_b * VECTOR
        _turn_heads(q, out, group * HEADS, H, i, L, q_h, q_l, out_l, c, s, INTERLEAVED, D, HALF, VECTOR, BLOCK_F, BLOCK_P, HEADS)
    else:
        k += b * k_b * VECTOR
        kout += b * kout_b * VECTOR
        h = (group - groups) * HEADS
        _turn_heads(k, kout, h, Hkv, i, L, k_h, k_l, kout_l, c, s, INTERLEAVED, D, HALF, VECTOR, BLOCK_F, BLOCK_P, HEADS)


@triton.jit
def _turn_heads(
    x, out, h, H, i, L, x_h, x_l, out_l, c, s,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads h up to h + HEADS of tokens i, of one sequence; c and s (tokens, BLOCK_F)."""
    dtype: tl.constexpr = out.dtype.element_ty
    f, p = tl.arange(0, BLOCK_F)[None, :], tl.arange(0, BLOCK_F * 2)[None, :]
    for _ in tl.static_range(HEADS):
        live = (i < L)[:, None] & (h < H)
        start = x + (h.to(tl.int64) * x_h + i[:, None] * x_l) * VECTOR
        to = out + h.to(tl.int64) * D + i[:, None] * out_l * VECTOR
        if INTERLEAVED:
            whole = tl.load(start + p, mask=live & (p < 2 * HALF), other=0.0).to(tl.float32)
            x0, x1 = tl.split(tl.reshape(whole, [whole.shape[0], BLOCK_F, 2]))
            turned = tl.reshape(tl.join(x0 * c - x1 * s, x1 * c + x0 * s), [whole.shape[0], 2 * BLOCK_F])
            tl.store(to + p, round_to(turned, dtype), mask=live & (p < 2 * HALF))
        else:
            x0 = tl.load(start + f, mask=live & (f < HALF), other=0.0).to(tl.float32)
            x1 = tl.load(start + HALF + f, mask=live & (f < HALF), other=0.0).to(tl.float32)
            tl.store(to + f, round_to(x0 * c - x1 * s, dtype), mask=live & (f < HALF))
            tl.store(to + HALF + f, round_to(x1 * c + x0 * s, dtype), mask=live & (f < HALF))
        if BLOCK_P > 0:
            rest = 2 * HALF + tl.arange(0, BLOCK_P)[None, :]
            tl.store(to + rest, tl.load(start + rest, mask=live & (rest < D)), mask=live & (rest < D))
        h += 1


settle_keys(primitives, sys.modules[__name__])


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    if problem.width > WIDEST:
        reasons.append(f"head dimension {problem.width} is over {WIDEST}")
    return reasons


def forward_plan(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool):
    """For calls like this one, of packed tokens however many: (q, k, cos, sin) -> q and k, turned."""
    given = q, k, cos, sin
    if not all(_adjacent(x) for x in given):
        plan = forward_plan(*_copied(*given), interleaved, inverse)
        return lambda *given: plan(*_copied(*given))
    packed = q.dim() == 3
    results = [head_memory(x.to("meta")) for x in (q, k)]
    start, handle, values = ready(rotary_launch(*given, *results, interleaved, inverse))
    constants, config = values[VARYING:], config_of(q.shape[-1], cos.shape[-1])
    groups = _groups(q.shape[1], k.shape[1], config)

    def call(q, k, cos, sin):
        out, kout = head_memory(q), head_memory(k)
        tokens, sequences = (q.shape[0], 1) if packed else (q.shape[2], q.shape[0])
        programs = sequences * groups * -(-tokens // config.BLOCK_M)
        if programs:
            start(programs, (*map(handle, (q, k, cos, sin, out, kout)), tokens, *constants))
        return out, kout

    return call


def _adjacent(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _copied(*tensors: Tensor) -> list[Tensor]:
    return [x if _adjacent(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]  # what is empty as well


def config_of(D: int, half: int) -> RotaryConfig:
    """For `half` pairs among D features: a thread has 8 features of a head, and several heads are on their way at once."""
    widest = max(triton.next_power_of_2(half), triton.next_power_of_2(max(D - 2 * half, 1)) // 2, 8)
    return RotaryConfig(max(1024 // widest, 1), 4, 4, 1)


def rotary_launch(q, k, cos, sin, out, kout, interleaved: bool, inverse: bool) -> Launch:
    """q, out (B, H, L, D), k, kout (B, Hkv, L, D), cos, sin (L, R / 2) or (B or 1, L, R / 2); or packed (T, H, D), (T, Hkv, D),
    (T, R / 2). out and kout in `head_memory`."""
    q, k, out, kout = (x if x.dim() == 4 else x.transpose(0, 1)[None] for x in (q, k, out, kout))
    (B, H, L, D), half = q.shape, cos.shape[-1]
    tensors = {"q": q, "k": k, "cos": cos.expand(B, L, half), "sin": sin.expand(B, L, half), "out": out, "kout": kout}
    strides = {f"{name}_{axis}": x.stride(dim) for name, x in tensors.items() for axis, dim in (("b", 0), ("l", -2))}
    strides |= {"q_h": q.stride(1), "k_h": k.stride(1)}
    unit = vector(min(x.element_size() for x in tensors.values()), list(tensors.values()), [*strides.values(), D])
    rest = D - 2 * half
    arguments = {**tensors, **{name: stride // unit for name, stride in strides.items()}}
    arguments.update(L=L, H=H, Hkv=k.shape[1], D=D, HALF=half, INTERLEAVED=interleaved, sign=-1.0 if inverse else 1.0)
    arguments.update(VECTOR=unit, BLOCK_F=triton.next_power_of_2(half), BLOCK_P=triton.next_power_of_2(rest) if rest else 0)
    config = config_of(D, half)
    return Launch(_rotary_kernel, B * _groups(H, k.shape[1], config) * -(-L // config.BLOCK_M), arguments, config)


def _groups(H: int, Hkv: int, config: RotaryConfig) -> int:
    return -(-H // config.HEADS) + -(-Hkv // config.HEADS)
