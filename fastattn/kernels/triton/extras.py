"""What a call adds to the scores of a tile, a bias, and what it takes from its weights, those that dropout does not keep.

A kernel puts together what it is given for the bias, as it does for tiles.py: `extras`, which is bias, its four strides and how
many keys it has; table, buckets, reach; slopes and their two strides; a. At most one of bias, table and slopes is not None.
- bias (B, H, M, N), each or 1, of packed sequences by rank. bias_m is None where one row is of all queries, bias_n where keys are
  adjacent; one key of all has bias_n 0 and no end. Strides of b, h and m, and the number of keys, count UNIT elements, by which
  the compiler sees wide loads; UNIT is 1 where keys are not adjacent.
- table (num_buckets, H), contiguous, and buckets (2 reach + 1,): bias table[buckets[j - i - a, clamped to reach], h].
- slopes (B or 1, H): bias -slope |j - i - a|; a is N - M of the sequence, or 0.
The bits of dropout, `kept`, are int32 and contiguous, with the rows of lse and kept_words words in each: bit j % 32 of word
j // 32 says whether the weight of key j is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import rescale
from fastattn.kernels.triton.launch import vector
from fastattn.kernels.triton.primitives import LOG2_E
from fastattn.lowering import Extras

# What extras give kernels, in the order of their parameters: behind the mask's tensors and its list of tiles
TENSORS = ("bias", "table", "buckets", "slopes", "kept")
NOTHING = (None,) * len(TENSORS)
# integers that must not be compiled in
RUNTIME = ["bias_b", "bias_h", "bias_m", "bias_n", "bias_keys", "reach", "slopes_b", "slopes_h", "kept_words"]


@triton.jit
def biased(s, m, n, row_live, b, h, H, extras, UNIT: tl.constexpr, KEY_MAJOR: tl.constexpr = False):
    """Scores s in units of log 2 with the bias, if there is one; KEY_MAJOR: s is (len(n), len(m))."""
    if extras[0] is None and extras[6] is None and extras[9] is None:
        return s
    elif KEY_MAJOR:
        return s + tl.trans(bias_tile(m, n, row_live, b, h, H, extras, UNIT))
    else:
        return s + bias_tile(m, n, row_live, b, h, H, extras, UNIT)


@triton.jit
def bias_tile(m, n, row_live, b, h, H, extras, UNIT: tl.constexpr):
    """The bias of queries m and keys n for query head h in units of log 2: fp32, (len(m) or 1, len(n)).

    0 where it is not read: in rows that are not live, which may hold anything, and beyond the bias's keys.
    """
    bias, bias_b, bias_h, bias_m, bias_n, bias_keys, table, buckets, reach, slopes, slopes_b, slopes_h, a = extras
    if bias is not None:
        bias += (b * bias_b + h * bias_h) * UNIT
        places, inside = n[None, :], (n // UNIT < bias_keys)[None, :]
        if bias_n is not None:
            places = n.to(tl.int64)[None, :] * bias_n
        if bias_m is not None:
            places = m.to(tl.int64)[:, None] * (bias_m * UNIT) + places
            inside = row_live[:, None] & inside
        return tl.load(bias + places, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    else:
        distance = n[None, :] - m[:, None] - a
        if table is not None:
            bucket = tl.load(buckets + tl.minimum(tl.maximum(distance, -reach), reach) + reach)
            return tl.load(table + (bucket * H + h)).to(tl.float32) * LOG2_E
        else:
            slope = tl.load(slopes + b * slopes_b + h * slopes_h) * LOG2_E
            return -slope * tl.abs(distance).to(tl.float32)


@triton.jit
def kept_tile(m, n0, row_live, row, kept, kept_words, BLOCK_N: tl.constexpr):
    """Which weights of queries m and keys n0 .. n0 + BLOCK_N - 1 dropout keeps: bool (len(m), BLOCK_N).

    row: where the head's rows begin in lse, and in kept. A word for 32 keys is loaded once and spread. Of a row that is not live,
    and of pairs that the mask hides, it may say anything.
    """
    WORDS: tl.constexpr = max(BLOCK_N // 32, 1)
    WIDTH: tl.constexpr = min(BLOCK_N, 32)
    word = n0 // 32 + tl.arange(0, WORDS)
    inside = row_live[:, None] & (word < kept_words)[None, :]
    words = tl.load(kept + (row + m)[:, None] * kept_words + word[None, :], mask=inside, other=0)
    spread = (words[:, :, None] >> (n0 % 32 + tl.arange(0, WIDTH))[None, None, :]) & 1
    return tl.reshape(spread, [m.shape[0], BLOCK_N]) != 0


def arguments(extras: Extras) -> dict[str, Any]:
    """The tensors, and what kernels take with each: None beside one that is not there."""
    bias, buckets, slopes, kept = extras.bias, extras.buckets, extras.slopes, extras.kept
    found: dict[str, Any] = {name: getattr(extras, name) for name in TENSORS}
    found.update(dict.fromkeys((*RUNTIME, "kept_scale")))
    found.update(BOTTOM_RIGHT=extras.bottom_right and (buckets is not None or slopes is not None), BIAS_UNIT=1)
    if bias is not None:
        b, h, m, n = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
        unit = vector(bias.element_size(), [bias], [b, h, m, bias.shape[3]]) if n == 1 else 1
        found.update(bias_b=b // unit, bias_h=h // unit, bias_m=None if bias.shape[2] == 1 else m // unit)
        found.update(bias_n=None if n == 1 else n, bias_keys=2**30 if n == 0 else bias.shape[3] // unit, BIAS_UNIT=unit)
    if buckets is not None:
        found.update(reach=buckets.shape[0] // 2)
    if slopes is not None:
        found.update(slopes_b=0 if slopes.shape[0] == 1 else slopes.stride(0), slopes_h=slopes.stride(1))
    if kept is not None:
        found.update(kept_words=kept.shape[-1], kept_scale=rescale(extras.dropout))
    return found


def handles(extras: Extras, handle: Callable[[Tensor], Any]) -> tuple:
    """The tensors of a call."""
    return tuple(None if x is None else handle(x) for x in (getattr(extras, name) for name in TENSORS))
