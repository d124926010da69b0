"""The triton backend of attention's dropout bits: one kernel draws each word once, for forward and backward to read.

A program has a block of queries of a head. What the bounds of the mask leave of them lies in a rectangle, rows by words of 32
keys, whose words are dealt out to threads in turn: neither short rows nor hidden keys leave a thread idle. A thread makes the 4
calls of each of its words. Sizes, bounds, seed and rate are run-time arguments; compiled in is which bounds there are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import threshold
from fastattn.kernels.triton import philox, primitives, tiles
from fastattn.kernels.triton.attention import LONGEST, _mask_arguments
from fastattn.kernels.triton.launch import Launch, ready, refusals, settle_keys
from fastattn.kernels.triton.philox import kept_words, key_of
from fastattn.kernels.triton.tiles import key_interval, mask_bounds, sequence
from fastattn.kernels.triton.tuned import Config
from fastattn.lowering import LoweredMask, Prepared

# Queries of a program, and words that its threads draw at a time, one each. No table has them: the kernel is bound by its
# arithmetic, and these leave few idle at the ends of short sequences.
CONFIG = Config(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=1)
MASK_TENSORS = ("prefix", "key_begin", "key_end", "query_end", "query_starts", "key_starts")
VARYING = 2 + len(MASK_TENSORS) + 6  # parameters that differ from call to call: tensors, then sizes and the rate
RUNTIME = ["total", "H", "M", "N", "words", "threshold", "low", "high", "prefix_high"]


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["seed"])
def _attention_bits_kernel(
    seed, bits, prefix, key_begin, key_end, query_end, query_starts, key_starts, total, H, M, N, words, threshold,
    low, high, prefix_high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """bits (B, H, M, words), or of packed sequences (H, total, words), of which only what the mask's bounds leave is written."""
    blocks = tl.cdiv(M, BLOCK_M)
    head = tl.program_id(0) // blocks
    m0 = tl.program_id(0) % blocks * BLOCK_M
    b, h = head // H, head % H
    place = head.to(tl.int64) * M
    if query_starts is not None:
        q_begin, M = sequence(query_starts, b, total, M)
        _, N = sequence(key_starts, b, 2147483647, N)
        place = h.to(tl.int64) * total + q_begin
    prefix_end, begin, end, first, rows = mask_bounds(low, high, prefix_high, prefix, key_begin, key_end, query_end, b, M, N)
    bounds = low, high, prefix_high, prefix_end, begin, end, first, rows
    m1 = tl.minimum(m0 + BLOCK_M, rows)
    m0 = tl.maximum(m0, first)
    begin, _ = key_interval(m0, bounds)  # neither end moves back from query to query
    _, end = key_interval(m1 - 1, bounds)
    begin = begin // 32
    last = tl.maximum(tl.cdiv(end, 32), begin + 1)
    width = last - begin
    left = tl.where((m0 < m1) & (end > begin * 32), (m1 - m0) * width, 0)
    k0, k1 = key_of(seed)
    bits += place * words
    i, word = m0 + tl.arange(0, BLOCK_N) // width, begin + tl.arange(0, BLOCK_N) % width
    for _ in range(0, left, BLOCK_N):
        c1 = i.to(tl.uint32)
        c2, c3 = (c1 & 0) + h.to(tl.uint32), (c1 & 0) + b.to(tl.uint32)
        drawn = kept_words(k0, k1, word.to(tl.uint32), c1, c2, c3, threshold.to(tl.uint32))
        tl.store(bits + (i.to(tl.int64) * words + word), drawn, mask=i < m1)
        word += BLOCK_N % width  # without a division for each
        over = word >= last
        i += tl.where(over, BLOCK_N // width + 1, BLOCK_N // width)
        word = tl.where(over, word - width, word)


settle_keys(primitives, tiles, philox, sys.modules[__name__])


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    for name, length in (("queries", problem.M), ("keys", problem.N)):
        if length > LONGEST:
            reasons.append(f"{length} {name} are more than {LONGEST}")
    return reasons


def attention_bits_plan(seed: Tensor, rows: int, B: int, H: int, M: int, N: int, mask: Prepared):
    """For calls like this one: (seed, rows, B, H, M, N, p, mask) -> bits, of which only what the bounds leave is written."""

    def make(like: Tensor, rows: int, B: int, H: int, M: int, N: int) -> Tensor:
        words = -(-N // 32)
        return like.new_empty((H, rows, words) if packed else (B, H, M, words), dtype=torch.int32)

    packed = mask.packed
    launch = attention_bits_launch(seed, make(seed.to("meta"), rows, B, H, M, N), H, M, N, 0.0, mask.fields)
    start, handle, values = ready(launch)
    constants = values[VARYING:]

    def call(seed: Tensor, rows: int, B: int, H: int, M: int, N: int, p: float, mask: Prepared) -> Tensor:
        bits = make(seed, rows, B, H, M, N)
        programs = B * H * -(-M // CONFIG.BLOCK_M)
        if programs and bits.numel():
            f = mask.fields
            fields = f.prefix, f.key_begin, f.key_end, f.query_end, f.query_starts, f.key_starts  # MASK_TENSORS
            tensors = [None if x is None else handle(x) for x in (seed, bits, *fields)]
            start(programs, (*tensors, rows, H, M, N, bits.shape[-1], threshold(p), *constants))
        return bits

    return call


def attention_bits_launch(seed: Tensor, bits: Tensor, H: int, M: int, N: int, p: float, mask: LoweredMask) -> Launch:
    """M, N: queries and keys, of packed sequences the most of one."""
    B = bits.shape[0] if mask.query_starts is None else mask.query_starts.shape[0] - 1
    given = _mask_arguments(mask, None)
    arguments: dict[str, Any] = {name: given[name] for name in (*MASK_TENSORS, "low", "high", "prefix_high")}
    arguments.update(seed=seed, bits=bits, total=bits.shape[-2], H=H, M=M, N=N, words=bits.shape[-1], threshold=threshold(p))
    return Launch(_attention_bits_kernel, B * H * triton.cdiv(M, CONFIG.BLOCK_M), arguments, CONFIG)
