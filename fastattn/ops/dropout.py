"""Which attention weights a call keeps, drawn once for its forward and its backward: problem, schema, fake, and the call.

    attention_bits(seed, rows, B, H, M, N, p, mask, backend) -> int32 (B, H, M, ceil(N / 32)), or packed (H, rows, ceil(N / 32))

`seed` is one int64 on the device of the call. B, H, M, N: sequences, query heads, queries, keys; of packed sequences M and N are
the most of one and `rows` those of q. Only the rows and words that the mask's bounds leave are sure to be written: what else
they hold, nobody may read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.lowering import LoweredMask, Prepared, classed
from fastattn.ops import dispatch
from fastattn.planned import look_up, plain, watched

BACKENDS = ("triton", "cpu", "eager")  # in order of preference
# Of a mask what bounds rows and words; the rest of it, bits and ids, tells words apart by pairs and not by place
BOUNDS = ("low", "high", "prefix_high", "prefix", "key_begin", "key_end", "query_end", "query_starts", "key_starts")
_NUMBERS = ("low", "high", "prefix_high")


class BitsProblem(NamedTuple):
    """One request, from metadata alone."""

    device: str
    M: int
    N: int
    dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        return f"attention_bits(M={self.M} N={self.N}, {self.device})"


def attention_bits(
    seed: Tensor, rows: int, B: int, H: int, M: int, N: int, p: float, mask: LoweredMask | Prepared, backend: str = "auto"
) -> Tensor:
    fields, unseen = (mask.fields, []) if isinstance(mask, Prepared) else (mask, mask.tensors)
    if not watched() and plain(seed, *unseen):
        mask = mask if isinstance(mask, Prepared) else _bounds(M, N, *(getattr(mask, name) for name in BOUNDS))
        return _by_plan(seed, rows, B, H, M, N, p, mask, backend)
    return _BITS(seed, rows, B, H, M, N, p, *(getattr(fields, name) for name in BOUNDS), backend)


def _bounds(M, N, *bounds) -> Prepared:
    return Prepared(LoweredMask(**dict(zip(BOUNDS, bounds, strict=True)), max_queries=M, max_keys=N))


def _by_plan(seed, rows, B, H, M, N, p, mask: Prepared, backend):
    key = "attention bits", seed.device, classed(M), classed(N), mask.key, backend
    plan = look_up(key, lambda: _plan(seed, rows, B, H, M, N, mask, backend), True)
    return plan(seed, rows, B, H, M, N, p, mask)


def _plan(seed, rows, B, H, M, N, mask: Prepared, backend):
    module = dispatch.choose("dropout", BACKENDS, backend, BitsProblem(seed.device.type, M, N))
    if hasattr(module, "attention_bits_plan"):
        return module.attention_bits_plan(seed, rows, B, H, M, N, mask)
    return lambda *given: module.attention_bits(*given[:-1], given[-1].fields)


def _bits(seed, rows, B, H, M, N, p, *rest):
    *bounds, backend = rest
    return _by_plan(seed, rows, B, H, M, N, p, _bounds(M, N, *bounds), backend)


def _bits_fake(seed, rows, B, H, M, N, p, *rest):
    packed, words = rest[BOUNDS.index("query_starts")] is not None, (N + 31) // 32
    return seed.new_empty((H, rows, words) if packed else (B, H, M, words), dtype=torch.int32)


def _bits_autograd(*args):
    if torch.compiler.is_dynamo_compiling():
        return _BITS(*args)
    with dispatch.below_autograd():  # integers: there is no gradient
        return _BITS(*args)


_BITS = dispatch.define(
    "attention_bits(Tensor seed, SymInt rows, SymInt B, SymInt H, SymInt M, SymInt N, float p, "
    + ", ".join(f"{'SymInt' if name in _NUMBERS else 'Tensor'}? {name}" for name in BOUNDS)
    + ", str backend) -> Tensor",
    _bits, _bits_fake, _bits_autograd,
)  # fmt: skip
