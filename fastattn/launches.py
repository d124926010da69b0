"""The Triton launches of a request, as data: what `fastattn.kernels.triton.ahead` compiles.

`functools.partial` of a function here is a job for `compile_ahead`. `launches_of` takes any call of the public functions; the
others make the launches of one request on tensors that hold nothing worth computing with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import masks, testing
from fastattn.kernels.triton import attention, dropout, ffn, gated, norm, rotary
from fastattn.kernels.triton.launch import GPU, Launch, recorded
from fastattn.lowering import Extras, LoweredMask, head_memory
from fastattn.packing import Packing

HOPPER = GPU(90)


def launches_of(request: Callable[[], object], gpu: GPU = HOPPER) -> list[Launch]:
    """What `request` launches, which calls public functions with `backend="triton"` on tensors of the CPU, gradients included.

    Specialised exactly as the same call on that GPU: by dtypes, sizes, strides, alignment and what is given and what is not.
    """
    with recorded(gpu) as launches:
        request()
    return launches


def attention_launches(
    dtype: torch.dtype, D: int, mask: str, L: int = 640, inside: bool = True, gpu: GPU = HOPPER, Dv: int | None = None,
    group: int = 1, packed: bool = False, inference: bool = False, extras: str = "", qkv_bias: bool = False,
) -> list[Launch]:  # fmt: skip
    """Forward and backward, or the forward alone as `inference` takes it, without the log-sum-exp.

    mask: a name of `_mask` below, or one of `testing.MASKS`. inside: (B, L, H, D) memory. packed: sequences of up to L tokens end
    to end, (T, H, D). extras: names of `_extras`, with "+" between them; the gradient of a bias is made. qkv_bias: the forward
    alone, which adds one.
    """
    H = 2
    lowered, tokens = _lowered(mask, H * group, L, packed)
    B, rows = (1, tokens) if packed else (2, L)

    def empty(heads: int, width: int) -> Tensor:
        shape = (B, rows, heads, width) if inside else (B, heads, rows, width)
        x = torch.zeros(shape, dtype=dtype)
        return x.transpose(1, 2) if inside else x

    Dv = D if Dv is None else Dv
    q, dq, out, dout = empty(H * group, D), empty(H * group, D), empty(H * group, Dv), empty(H * group, Dv)
    k, dk, v, dv = empty(H, D), empty(H, D), empty(H, Dv), empty(H, Dv)
    lse = torch.zeros(B, H * group, rows)
    sequences = lowered.query_starts.shape[0] - 1 if lowered.query_starts is not None else B
    added = _extras(extras, sequences, H * group, L, lse, dtype)
    if inference or qkv_bias:
        shift = torch.zeros(3, H, D, dtype=dtype) if qkv_bias else None
        return [attention.forward_launch(q, k, v, out, None if inference else lse, lowered, D**-0.5, gpu, added, shift)]
    forward = attention.forward_launch(q, k, v, out, lse, lowered, D**-0.5, gpu, added)
    given = dout, None, q, k, v, out, lse, dq, dk, dv, lowered, D**-0.5, gpu, added
    columns = torch.zeros(sequences, H * group, L) if "row" in extras else None
    return [forward, *attention.backward_launches(*given, columns, "pairs" in extras or "relative" in extras)]


def _extras(names: str, B: int, H: int, L: int, lse: Tensor, dtype: torch.dtype) -> Extras:
    """pairs, row: a bias (1, H, L, L), (B, 1, 1, L); relative: a table by distance; alibi; dropout."""
    made: dict[str, dict[str, Any]] = {
        "pairs": {"bias": torch.zeros(1, H, L, L, dtype=dtype)},
        "row": {"bias": torch.zeros(B, 1, 1, L, dtype=dtype)},
        "relative": {"table": torch.zeros(32, H), "buckets": torch.zeros(257, dtype=torch.int32)},
        "alibi": {"slopes": torch.zeros(1, H), "bottom_right": True},
        "dropout": {"kept": torch.zeros(*lse.shape, -(-L // 32), dtype=torch.int32), "dropout": 0.1},
    }
    return Extras(**{field: value for name in filter(None, names.split("+")) for field, value in made[name].items()})


def bits_launches(mask: str, L: int = 640, packed: bool = False) -> list[Launch]:
    """The draw of attention's dropout bits."""
    H = 2
    lowered, tokens = _lowered(mask, H, L, packed)
    words = -(-L // 32)
    bits = torch.empty((H, tokens, words) if packed else (2, H, L, words), dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    return [dropout.attention_bits_launch(seed, bits, H, L, L, 0.1, lowered)]


@functools.cache
def _lowered(mask: str, H: int, L: int, packed: bool) -> tuple[LoweredMask, int]:
    """The mask as kernels receive it, and how many tokens packed sequences have."""
    lengths = [L, L // 2, L // 3] if packed else [L, L]
    packing = Packing.from_lengths(lengths, L)
    made = _mask(mask, len(lengths), H, L, packing if packed else None)
    return made.lower_packed(packing, packing, H) if packed else made.lower(L, L), packing.total


def _mask(name: str, B: int, H: int, L: int, packing: Packing | None) -> masks.Mask:
    if name in testing.MASKS and packing is None:
        return testing.MASKS[name](B, H, L, L, torch.Generator().manual_seed(0), "cpu") or masks.full()
    lengths = torch.zeros(B, dtype=torch.int32)
    ids = torch.zeros((B, L) if packing is None else (packing.total,), dtype=torch.int32)
    return {
        "none": masks.full,
        "causal": masks.causal,
        "padding": lambda: masks.padding(lengths),
        "causal_padding": lambda: masks.causal() & masks.padding(lengths),
        "prefix": lambda: masks.prefix_lm(lengths),
        "keys": lambda: masks.key_padding(torch.ones(B, L, dtype=torch.bool)),
        "documents": lambda: masks.documents(ids),
        "bits": lambda: masks.dense(torch.ones(B, H, L, L, dtype=torch.bool)),
    }[name]()


def linear_launches(
    dtype: torch.dtype, activation: str, M: int, K: int, N: int, gpu: GPU = HOPPER, dropout: float = 0.0
) -> list[Launch]:
    """Forward with bias, residual and z; dz with its sums; dz in the epilogue of the product with the second weight. With dropout
    the two launches of an ffn that are concerned: forward, which has no residual then, and the last."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias, hidden = empty(M, K), empty(N, K), empty(N), empty(M, N)
    sums = empty(ffn.dz_parts(hidden), N, dtype=torch.float32)
    dy, second = empty(M, K), empty(K, N)
    second_sums = empty(ffn.dgrad_parts(dy, second, gpu), N, dtype=torch.float32)
    if dropout:
        drop = empty(1, dtype=torch.int64), dropout
        return [
            ffn.forward_launch(x, weight, bias, None, hidden, hidden, activation, gpu, *drop),
            ffn.dgrad_launch(dy, second, hidden, hidden, second_sums, activation, gpu, *drop),
        ]
    return [
        ffn.forward_launch(x, weight, bias, hidden, hidden, hidden, activation, gpu),
        ffn.dz_launch(hidden, hidden, hidden, sums, activation),
        ffn.dgrad_launch(dy, second, hidden, hidden, second_sums, activation, gpu),
    ]


def gated_launches(dtype: torch.dtype, activation: str, columns: int, M: int = 128, dropout: float = 0.0) -> list[Launch]:
    """Forward and backward between the two products of a gated ffn, whose hidden layer is (M, columns)."""
    z, hidden = (torch.empty(M, width, dtype=dtype, device="meta") for width in (2 * columns, columns))
    drop = (torch.empty(1, dtype=torch.int64, device="meta"), dropout) if dropout else (None, 0.0)
    return [gated.forward_launch(z, hidden, activation, *drop), gated.backward_launch(hidden, z, z, activation, *drop)]


def norm_launches(
    dtype: torch.dtype, N: int, rms: bool, M: int = 128, gpu: GPU = HOPPER, inference: bool = False, dropout: float = 0.0
) -> list[Launch]:
    """Forward and backward with everything that a request can have, dropout apart, or the forward alone with nothing but y to
    write; an RMSNorm has neither mean nor bias."""
    x, weight, rstd = (torch.empty(s, device="meta", dtype=d) for s, d in (((M, N), dtype), (N, dtype), (M, torch.float32)))
    mean, bias = (None, None) if rms else (rstd, weight)
    if inference:
        return [norm.forward_launch(x, x, weight, bias, x, None, None, None, 1e-6, rms, gpu)]
    dweight = torch.empty(norm.parts(x, True, gpu)[0], N, device="meta")
    drop = (torch.empty(1, device="meta", dtype=torch.int64), dropout) if dropout else (None, 0.0)
    return [
        norm.forward_launch(x, x, weight, bias, x, x, mean, rstd, 1e-6, rms, gpu, *drop),
        norm.backward_launch(
            x, x, x, mean, rstd, weight, x, dweight, None if rms else dweight, gpu, x if dropout else None, *drop
        ),
    ]


def rotary_launches(
    dtype: torch.dtype, D: int, interleaved: bool, L: int = 640, packed: bool = False, turned: int | None = None
) -> list[Launch]:
    """Forward, which backward is too, with tables in fp32; `turned` of D features, or all."""
    shape = (L, 4, D) if packed else (2, 4, L, D)
    q = head_memory(torch.empty(shape, dtype=dtype, device="meta"))
    table = torch.empty(L, (D if turned is None else turned) // 2, device="meta")
    return [rotary.rotary_launch(q, q, table, table, q, q, interleaved, False)]
