"""The draw of dropout in kernels, which `fastattn/dropout.py` defines: Philox-4x32-10 (Salmon et al., 2011), 8 elements a call.

All counters are uint32. A call leaves 8 bits of a word of 32 columns, so words are what kernels build, and where elements are
wanted they are spread from words.
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl

from fastattn.kernels.triton.launch import settle_keys
from fastattn.kernels.triton.primitives import INTERPRET

ROUNDS = tl.constexpr(10)


@triton.jit
def product(a, b: tl.constexpr):
    """The high and the low half of a * b. One instruction, which the compiler would split in every other round."""
    if INTERPRET:
        wide = a.to(tl.uint64) * b
        return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .u64 wide; mul.wide.u32 wide, $2, $3; mov.b64 {$1, $0}, wide; }", "=r,=r,r,r", [a, b],
            dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """The four words of counters c0 .. c3 under the key (k0, k1); all are uint32, and shapes broadcast."""
    for _ in tl.static_range(ROUNDS):
        first_high, first_low = product(c0, 0xD2511F53)
        second_high, second_low = product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = second_high ^ c1 ^ k0, second_low, first_high ^ c3 ^ k1, first_low
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def key_of(seed):
    """The key (k0, k1) of a seed, a pointer to one int64."""
    value = tl.load(seed).to(tl.uint64, bitcast=True)
    return value.to(tl.uint32), (value >> 32).to(tl.uint32)


@triton.jit
def eighth(k0, k1, c0, c1, c2, c3, threshold):
    """The bits that one call gives of a word, in the places of call 0: 0, 1, 8, 9, 16, 17, 24 and 25, set where kept. For a
    threshold of 0 none is: see `everything`."""
    x0, x1, x2, x3 = philox(k0, k1, c0, c1, c2, c3)
    below = (threshold << 16) - 1  # a half is kept where, shifted to the upper half of a word, it is above
    return _pair(_pair(_pair(_pair(c0 & 0, x0, below, 0), x1, below, 8), x2, below, 16), x3, below, 24)


@triton.jit
def _pair(bits, x, below, PLACE: tl.constexpr):
    """With two bits more, by additions made only where they hold: half the integer operations that selecting each bit takes."""
    LOW: tl.constexpr = 1 << PLACE
    HIGH: tl.constexpr = 2 << PLACE
    bits = tl.where((x << 16) > below, bits + LOW, bits)
    return tl.where(x > below, bits + HIGH, bits)


@triton.jit
def everything(threshold):
    """All bits of a word where the threshold is 0, else none: uint32."""
    return tl.where(threshold == 0, 0xFFFFFFFF, 0).to(tl.uint32)


@triton.jit
def kept_words(k0, k1, word, c1, c2, c3, threshold):
    """Which of the 32 columns of each `word` are kept under counters c1, c2, c3, as int32 bits; all are uint32."""
    bits = eighth(k0, k1, word * 4, c1, c2, c3, threshold)
    for call in tl.static_range(1, 4):
        bits |= eighth(k0, k1, word * 4 + call, c1, c2, c3, threshold) << (2 * call)
    return (bits | everything(threshold)).to(tl.int32, bitcast=True)


@triton.jit
def kept_tile(seed, m, n, threshold, TAG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of the (BLOCK_M, BLOCK_N) tile at row m and column n an op of two dimensions keeps: bool.

    seed: pointer to one int64; threshold: `dropout.threshold(p)`; TAG: the op's, of `fastattn/dropout.py`. m and n are scalars,
    n a multiple of BLOCK_N or of 32. One thread makes a call, and the four of a word meet in a sum over the last dimension of a
    matrix: were that the dimension along which a word is spread, the compiler would have each thread make all four.
    """
    WORDS: tl.constexpr = max(BLOCK_N // 32, 1)
    WIDTH: tl.constexpr = min(BLOCK_N, 32)
    k0, k1 = key_of(seed)
    index = tl.arange(0, BLOCK_M * WORDS)
    i = m.to(tl.int64) + index // WORDS
    low, high = i.to(tl.uint32)[:, None], (i >> 32).to(tl.uint32)[:, None]
    call = tl.arange(0, 4).to(tl.uint32)[None, :]
    c0 = (n // 32 + index % WORDS).to(tl.uint32)[:, None] * 4 + call
    threshold = threshold.to(tl.uint32)
    bits = eighth(k0, k1, c0, low, high, (high & 0) + (0x80000000 | TAG), threshold) << (2 * call)
    words = tl.reshape(tl.sum(bits, 1) | everything(threshold), [BLOCK_M, WORDS])
    spread = words[:, :, None] >> (n % 32 + tl.arange(0, WIDTH)).to(tl.uint32)[None, None, :]
    return tl.reshape(spread & 1, [BLOCK_M, BLOCK_N]) != 0


settle_keys(sys.modules[__name__])
