"""The triton backend of attention: what it takes, tile sizes, launches.

`_attention_forward_kernel` is in attention_forward.py; `_attention_dq_kernel`, `_attention_dkdv_kernel` and, for short sequences,
`_attention_backward_kernel` in attention_backward.py. No atomics, so results are deterministic. Lengths, strides, heads and the
mask's values are run-time arguments; what is compiled in is the dtype, D and Dv, which mask fields there are, and whether rows
start at multiples of 16 bytes.

Packed sequences, q (1, H, Tq, D) beside k (1, Hkv, Tk, D), take the same kernels and tiles, with B the number of sequences, M and
N the most queries and keys of one: each program then looks up where its own sequence begins and how long it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.kernels.triton import attention_backward, attention_bias, attention_forward, primitives, tiles
from fastattn.kernels.triton import extras as added_to_tiles
from fastattn.kernels.triton.attention_backward import _attention_backward_kernel, _attention_dkdv_kernel, _attention_dq_kernel
from fastattn.kernels.triton.attention_bias import bias_launch, bias_launcher, bias_sums, make_columns, reduced_by
from fastattn.kernels.triton.attention_forward import _attention_forward_kernel
from fastattn.kernels.triton.extras import NOTHING
from fastattn.kernels.triton.launch import GPU, Launch, gpu_here, gpu_of, precision, ready, refusals, settle_keys, vector
from fastattn.kernels.triton.tuned import ONE_KERNEL, Config, Row, dtype_class, sources, tiles_of
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, Prepared, batched, classed, three
from fastattn.plans import KernelPlan, tensor_bytes

settle_keys(primitives, tiles, added_to_tiles, attention_forward, attention_backward, attention_bias)

# What a mask gives kernels, in the order of their parameters: these and one of its lists of tiles follow the call's own tensors
MASK_TENSORS = ("prefix", "key_begin", "key_end", "query_end", "keys", "ids", "key_ids", "bits", "query_starts", "key_starts")
KEY_TILES, QUERY_TILES = 0, 1
ADDS_QKV_BIAS = True  # the forward does, on load
LONGEST = 2**29  # queries or keys: sums of a place, a bound and a tile stay below 2^31
# Scales with which the forward is compiled for a multiply-add; any other takes two steps, as do listed tiles, which have no
# registers to spare for it.
FUSED = 2.0**-64, 2.0**8
# The one backward kernel has few programs, one for each head of k and v: with more queries two kernels fill a GPU better.
SINGLE_ROWS = 512


def configs(gpu: GPU, dtype: torch.dtype, block_d: int, N: int, listed: bool) -> tuple[Config, Config, Config]:
    """Of forward, dq and dkdv. block_d: columns of the wider tile; N: keys; listed: whether the mask comes with lists of
    tiles."""
    forward, dq, dkdv = (_row(f"attention_{name}", gpu, dtype, block_d, N, listed).config for name in ("forward", "dq", "dkdv"))
    return forward, dq, dkdv


def single_config(gpu: GPU, dtype: torch.dtype, block_d: int, rows: int, N: int, listed: bool) -> Config | None:
    """The tiles of the one backward kernel where it serves, else None. `rows`: queries of all heads that share one of k and v.

    It moves 8 rows of D a token where two kernels move 12, and multiplies 5 times a tile, not 7.
    """
    if listed or rows > SINGLE_ROWS:
        return None
    return _row(ONE_KERNEL, gpu, dtype, block_d, N, listed).config


def _row(kernel: str, gpu: GPU, dtype: torch.dtype, block_d: int, N: int, listed: bool) -> Row:
    return tiles_of(gpu).row(kernel, N, block_d=block_d, dtype=dtype_class(dtype), listed=listed)


def unsupported(problem) -> list[str]:
    reasons = refusals(problem)
    for name, size in (("head dimension", problem.D), ("head dimension of v", problem.Dv)):
        if not 1 <= size <= 128:
            reasons.append(f"{name} {size} is not in 1..128")
    for name, length in (("queries", problem.M), ("keys", problem.N)):
        if length > LONGEST:
            reasons.append(f"{length} {name} are more than {LONGEST}")
    return reasons


def forward_plan(
    q, k, v, mask: Prepared, scale: float, exact_lse: bool, want_lse: bool, extras: Extras = NO_EXTRAS,
    qkv_bias: Tensor | None = None,
):  # fmt: skip
    """For calls like this one: (q, k, v, mask) -> (out, lse or None), with the call's own extras or qkv_bias, (3, H, D) and
    contiguous, which lse is without. q, k and v are (B, H, L, D), or (T, H, D) of a packing. A caller that has memory for out, as
    it is made here, gives it."""
    make_out, make_lse = result(q, v.shape[-1], mask), statistics(q, mask, float("-inf"))
    out, lse = make_out(q.to("meta")), make_lse(q.to("meta")) if want_lse else None
    four = (batched(x) for x in (q, k, v, out))
    launch = forward_launch(*four, lse, mask.fields, scale, gpu_of(q.device), extras, qkv_bias)
    go, handle = launcher(launch, "q", KEY_TILES)
    packed, rows, extended = mask.packed, -2 if q.dim() == 4 else 0, extras.biased or extras.kept is not None

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Prepared, out=None, extras: Extras = NO_EXTRAS, qkv_bias=None):
        if out is None:
            out = make_out(q)
        lse = make_lse(q) if want_lse else None
        at_bias = None if qkv_bias is None else handle(qkv_bias)
        tensors = handle(q), handle(k), handle(v), handle(out), None if lse is None else handle(lse), at_bias
        added = added_to_tiles.handles(extras, handle) if extended else NOTHING
        if packed:
            go(tensors, mask, added, q.shape[rows], k.shape[rows])
        else:
            go(tensors, mask, added)
        return out, lse

    return call


def backward_plan(
    dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, joined: bool = False, extras: Extras = NO_EXTRAS,
    bias_grad: bool = False,
):  # fmt: skip
    """For calls like this one: (dout, dlse, q, k, v, out, lse, mask) -> (dq, dk, dv); lse and dlse are contiguous.

    joined: the gradients lie side by side for each token, and are given as the one matrix (tokens, 3 H D) that they are in.
    bias_grad: behind them the gradient of extras' bias or table.
    """
    make = joined_results(q, mask) if joined else separate_results(q, k, v, mask)
    _, *grads = make(q.to("meta"), k.to("meta"), v.to("meta"))
    given = (*(batched(x) for x in (q, k, v, out)), lse, *(batched(x) for x in grads))
    reduced = reduced_by(extras) if bias_grad else None
    columns = make_columns(q.to("meta"), k, mask) if reduced == "queries" else None
    gpu, pairs = gpu_of(q.device), bias_grad and reduced is None
    launches = backward_launches(batched(dout), dlse, *given, mask.fields, scale, gpu, extras, columns, pairs)
    if launches[-1].arguments["H"] == 0:  # no query, and no group of heads by which the kernels could divide
        return _nothing_seen(make, joined, bias_grad)
    packed, rows, extended = mask.packed, -2 if q.dim() == 4 else 0, extras.biased or extras.kept is not None
    first, handle = launcher(launches[0], "q" if len(launches) > 1 else "k", KEY_TILES)
    second, _ = launcher(launches[1], "k", QUERY_TILES) if len(launches) > 1 else (None, handle)
    third = bias_launcher(launches[2]) if pairs else None

    def call(dout, dlse, q, k, v, out, lse, mask: Prepared, extras: Extras = NO_EXTRAS) -> Any:
        returned, dq, dk, dv = make(q, k, v)
        totals = (q.shape[rows], k.shape[rows]) if packed else ()
        inputs, at_dout, at_lse = (handle(q), handle(k), handle(v)), handle(dout), handle(lse)
        at_dlse = None if dlse is None else handle(dlse)
        added = added_to_tiles.handles(extras, handle) if extended else NOTHING
        columns = make_columns(q, k, mask) if reduced == "queries" else None
        at_columns = None if columns is None else handle(columns)
        if second is None:
            gradients = handle(dq), handle(dk), handle(dv)
            first((*inputs, handle(out), at_dout, *gradients, at_lse, at_dlse, at_columns), mask, added, *totals)
        else:
            delta = lse.new_empty(lse.shape)
            first((*inputs, handle(out), at_dout, handle(dq), at_lse, at_dlse, handle(delta)), mask, added, *totals)
            second((*inputs, at_dout, handle(dk), handle(dv), at_lse, handle(delta), at_columns), mask, added, *totals)
        if not bias_grad:
            return returned
        if third is not None:
            masked = (mask.handles.get(handle) or _handles(mask, handle))[KEY_TILES]
            dbias = third((*inputs, at_dout, at_lse, handle(delta)), masked, added, mask.fields, extras, *totals)
        else:
            dbias = bias_sums(columns, dlse, lse, mask, extras.bias)
        return (returned, dbias) if joined else (*returned, dbias)

    return call


def _nothing_seen(make: Callable[..., tuple], joined: bool, bias_grad: bool) -> Callable[..., Any]:
    """A backward whose gradients are all 0."""

    def call(dout, dlse, q, k, v, out, lse, mask: Prepared, extras: Extras = NO_EXTRAS) -> Any:
        returned, *grads = make(q, k, v)
        for grad in grads:
            grad.zero_()
        if not bias_grad:
            return returned
        dbias = torch.zeros_like(extras.table if extras.bias is None else extras.bias)
        return (returned, dbias) if joined else (*returned, dbias)

    return call


def launcher(launch: Launch, blocked: str, tiles: int) -> tuple[Callable[..., None], Callable[[Tensor], Any]]:
    """`go(tensors, mask, added)`, of packed sequences with `total_queries, total_keys` behind, which launches a kernel on its
    first parameters, a mask and the handles of extras; and what handles are.

    blocked: whether a program has a block of the queries of a head ("q") or of keys ("k"; the one backward kernel has all).
    tiles: which of the mask's two lists of tiles the kernel reads.
    """
    start, handle, values = ready(launch)
    lead = launch.kernel.arg_names.index(MASK_TENSORS[0])
    constants = values[lead + len(MASK_TENSORS) + 1 + len(NOTHING) :]
    programs, heads = launch.programs, launch.arguments["H"] // (1 if blocked == "q" else max(launch.arguments["group"], 1))
    config = launch.config
    block = 0 if launch.kernel is _attention_backward_kernel else config.BLOCK_M if blocked == "q" else config.BLOCK_N

    def dense(tensors: tuple, mask: Prepared, added: tuple = NOTHING) -> None:
        start(programs, tensors + (mask.handles.get(handle) or _handles(mask, handle))[tiles] + added + constants)

    def packed(tensors: tuple, mask: Prepared, added: tuple, total_queries: int, total_keys: int) -> None:
        fields = mask.fields
        M, N = fields.max_queries, fields.max_keys
        blocks = -(-(M if blocked == "q" else N) // block) if block else min(M, N, 1)
        programs = (fields.query_starts.shape[0] - 1) * heads * blocks
        masked = (mask.handles.get(handle) or _handles(mask, handle))[tiles]
        if programs:
            start(programs, tensors + masked + added + (total_queries, total_keys, M, N) + constants[4:])

    if launch.arguments["query_starts"] is not None:
        return packed, handle
    return (dense if programs else _nothing), handle


def _nothing(*_: Any) -> None:
    """Of no rows."""


def _handles(mask: Prepared, handle: Callable[[Tensor], Any]) -> tuple[tuple, tuple]:
    """The mask's tensors in the order of kernels' parameters, with the tiles of keys and with those of queries."""
    found = [getattr(mask.fields, name) for name in (*MASK_TENSORS, "key_tiles", "query_tiles")]
    *shared, keys, queries = (None if x is None else handle(x) for x in found)
    mask.handles[handle] = (*shared, keys), (*shared, queries)
    return mask.handles[handle]


def forward_launch(
    q, k, v, out, lse, mask: LoweredMask, scale: float, gpu: GPU, extras: Extras = NO_EXTRAS, qkv_bias: Tensor | None = None
) -> Launch:
    (_, N), block_d = _classed_sizes(q, k, mask), _block(max(q.shape[3], v.shape[3]))
    config = _row("attention_forward", gpu, q.dtype, block_d, N, _crowded(mask, extras)).config
    return forward_with(config, q, k, v, out, lse, mask, scale, extras, qkv_bias)


def backward_launches(
    dout, dlse, q, k, v, out, lse, dq, dk, dv, mask: LoweredMask, scale: float, gpu: GPU, extras: Extras = NO_EXTRAS,
    columns: Tensor | None = None, pairs: bool = False,
) -> list[Launch]:  # fmt: skip
    """One kernel for short sequences; else dq first: it also makes delta = rowsum(dO * O) - dlse, which dkdv reads.

    columns: memory for the sums of dS over the queries, (B, H, N) in fp32. pairs: a kernel that reads delta follows.
    """
    (M, N), group = _classed_sizes(q, k, mask), q.shape[1] // max(k.shape[1], 1)
    block_d, crowded = _block(max(q.shape[3], v.shape[3])), _crowded(mask, extras)
    full = extras.biased and extras.kept is not None  # of one kernel these two together fill the registers
    single = None if pairs or full else single_config(gpu, q.dtype, block_d, group * M, N, mask.key_tiles is not None)
    if single is not None:
        return [single_with(single, dout, dlse, q, k, v, out, lse, dq, dk, dv, mask, scale, extras, columns)]
    dq_config, dkdv_config = (
        _row(kernel, gpu, q.dtype, block_d, N, crowded).config for kernel in ("attention_dq", "attention_dkdv")
    )
    if extras.biased or extras.kept is not None:  # they leave no registers for tiles that are fetched ahead
        dkdv_config = dkdv_config._replace(num_stages=1)
    delta = torch.empty_like(lse)
    return [
        dq_with(dq_config, dout, dlse, q, k, v, out, lse, delta, dq, mask, scale, extras),
        dkdv_with(dkdv_config, dout, q, k, v, lse, delta, dk, dv, mask, scale, extras, columns),
        *([dbias_with(dout, q, k, v, lse, delta, mask, scale, extras, gpu)] if pairs else []),
    ]


def _crowded(mask: LoweredMask, extras: Extras) -> bool:
    """Whether kernels take the tiles of masks with lists: a bias and the bits of dropout fill registers as ids and bits do."""
    return mask.key_tiles is not None or extras.biased or extras.kept is not None


def forward_with(
    config: Config, q, k, v, out, lse, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS, qkv_bias: Tensor | None = None
) -> Launch:
    arguments = _shared({"q": q, "k": k, "v": v, "out": out}, mask, mask.key_tiles, scale, extras)
    arguments.update(lse=lse, qkv_bias=qkv_bias)
    arguments.update(FUSED=extras.biased or (FUSED[0] <= scale <= FUSED[1] and mask.key_tiles is None))
    B, M, _ = _sizes(q, k, mask)
    return Launch(_attention_forward_kernel, _programs(B * q.shape[1], M, config.BLOCK_M), arguments, config)


def single_with(
    config: Config, dout, dlse, q, k, v, out, lse, dq, dk, dv, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS,
    columns: Tensor | None = None,
) -> Launch:  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    arguments = {**_shared(tensors, mask, None, scale, extras), "lse": lse, "dlse": dlse, "columns": columns}
    return Launch(_attention_backward_kernel, _sizes(q, k, mask)[0] * k.shape[1], arguments, config)


def dq_with(
    config: Config, dout, dlse, q, k, v, out, lse, delta, dq, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS
) -> Launch:
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq}
    arguments = {**_shared(tensors, mask, mask.key_tiles, scale, extras), "lse": lse, "dlse": dlse, "delta": delta}
    B, M, _ = _sizes(q, k, mask)
    return Launch(_attention_dq_kernel, _programs(B * q.shape[1], M, config.BLOCK_M), arguments, config)


def dkdv_with(
    config: Config, dout, q, k, v, lse, delta, dk, dv, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS,
    columns: Tensor | None = None,
) -> Launch:  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv}
    arguments = {**_shared(tensors, mask, mask.query_tiles, scale, extras), "lse": lse, "delta": delta, "columns": columns}
    B, _, N = _sizes(q, k, mask)
    return Launch(_attention_dkdv_kernel, _programs(B * k.shape[1], N, config.BLOCK_N), arguments, config)


def dbias_with(dout, q, k, v, lse, delta, mask: LoweredMask, scale: float, extras: Extras, gpu: GPU) -> Launch:
    tensors = {"q": q, "k": k, "v": v, "dout": dout}
    return bias_launch(_shared(tensors, mask, mask.key_tiles, scale, extras), lse, delta, extras, gpu)


def _lists_tiles(problem) -> bool:
    return problem.documents or problem.bits


def _is_crowded(problem) -> bool:
    return _lists_tiles(problem) or _is_biased(problem) or problem.dropout


def _is_biased(problem) -> bool:
    return problem.bias or problem.relative or problem.alibi


def _single_config(gpu: GPU, problem, block_d: int) -> Config | None:
    if _is_biased(problem) and problem.dropout:
        return None
    rows = problem.H // max(problem.Hkv, 1) * problem.M
    return single_config(gpu, problem.dtype, block_d, rows, problem.N, _lists_tiles(problem))


def notes(problem) -> list[str]:
    request, listed = (gpu_here(), problem.dtype, _block(max(problem.D, problem.Dv)), problem.N), _lists_tiles(problem)
    kernels, crowded = ("attention_forward", "attention_dq", "attention_dkdv"), _is_crowded(problem)
    rows = {kernel: _row(kernel, *request, crowded) for kernel in kernels}
    rows[ONE_KERNEL] = _row(ONE_KERNEL, *request, listed)
    single = _single_config(request[0], problem, request[2])
    del rows[ONE_KERNEL if single is None else "attention_dq"]
    return [f"tiles from {sources(rows.values())}"]


def plan(problem, backward: bool) -> list[KernelPlan]:
    """The kernels of a pass: for the GPU that is there, else for an H100."""
    gpu = gpu_here()
    block_d = _block(max(problem.D, problem.Dv))
    group = problem.H // max(problem.Hkv, 1)
    q, out, keys, lse = tensor_bytes(problem)

    def kernel(name: str, config: Config, products: tuple[int, int], moved: int) -> KernelPlan:
        return KernelPlan(
            name, f"{config.num_warps} warps, {config.num_stages} stages", config.BLOCK_M, config.BLOCK_N, products, moved
        )

    forward, dq, dkdv = configs(gpu, problem.dtype, block_d, problem.N, _is_crowded(problem))
    if not backward:
        moved = q + out + lse + keys * group * triton.cdiv(problem.M, forward.BLOCK_M)
        return [kernel("attention_forward_kernel", forward, (1, 1), moved)]
    single = _single_config(gpu, problem, block_d)
    if single is not None:
        return [kernel("attention_backward_kernel", single, (3, 2), 2 * (q + out + keys) + lse)]
    dq_moved = 2 * (q + out) + 2 * lse + keys * group * triton.cdiv(problem.M, dq.BLOCK_M)
    dkdv_moved = 2 * keys + (q + out + 2 * lse) * triton.cdiv(problem.N, dkdv.BLOCK_N)
    return [
        kernel("attention_dq_kernel", dq, (2, 1), dq_moved),
        kernel("attention_dkdv_kernel", dkdv, (2, 2), dkdv_moved),
    ]


def _shared(tensors: dict[str, Tensor], mask: LoweredMask, tiles: Tensor | None, scale: float, extras: Extras) -> dict[str, Any]:
    """Arguments that all kernels take: the (B, H, L, D) tensors with their strides, mask, extras, sizes, what is compiled in."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    packed = mask.query_starts is not None
    strides = {name: (0 if packed else x.stride(0), x.stride(1), x.stride(2)) for name, x in tensors.items()}
    unit = vector(q.element_size(), list(tensors.values()), [stride for some in strides.values() for stride in some])
    arguments: dict[str, Any] = dict(tensors)
    for name, (b, h, length) in strides.items():
        arguments.update({f"{name}_b": b // unit, f"{name}_h": h // unit, f"{name}_l": length // unit})
    arguments.update(_mask_arguments(mask, tiles))
    arguments.update(added_to_tiles.arguments(extras))
    arguments.update(total_queries=q.shape[2] if packed else None, total_keys=k.shape[2] if packed else None)
    H, Hkv, (_, M, N) = q.shape[1], k.shape[1], _sizes(q, k, mask)
    arguments.update(scale=scale, H=H, group=H // max(Hkv, 1), M=M, N=N)
    arguments.update(D=q.shape[3], BLOCK_D=_block(q.shape[3]), DV=v.shape[3], BLOCK_DV=_block(v.shape[3]))
    arguments.update(VECTOR=unit, PRECISION=precision(q.dtype))
    return arguments


def _mask_arguments(mask: LoweredMask, tiles: Tensor | None) -> dict[str, Any]:
    """The mask's fields and strides, 0 for a size of 1. low and high are both None or both numbers: one means no bound."""
    arguments: dict[str, Any] = {name: getattr(mask, name) for name in (*MASK_TENSORS, "low", "high", "prefix_high")}
    if mask.low is not None or mask.high is not None or mask.prefix is not None:
        low, high = -LONGEST if mask.low is None else mask.low, LONGEST if mask.high is None else mask.high
        arguments.update(low=_clamp(low), high=_clamp(high))
    if mask.prefix is not None:
        arguments.update(prefix_high=_clamp(mask.prefix_high))
    for name, x, dims in (
        ("keys", mask.keys, "bn"),
        ("ids", mask.ids, "bm"),
        ("key_ids", mask.key_ids, "bn"),
        ("bits", mask.bits, "bhmn"),
        ("tiles", tiles, "bht"),
    ):
        for axis, dim in enumerate(dims):
            arguments[f"{name}_{dim}"] = 0 if x is None or x.shape[axis] == 1 else x.stride(axis)
    return {**arguments, "tiles": tiles}


def _clamp(bound: int) -> int:
    """No j - i is as far from 0 as LONGEST."""
    return max(-LONGEST, min(bound, LONGEST))


def _block(columns: int) -> int:
    """Columns of a tile: a power of two, at least the 16 of tl.dot."""
    return max(16, triton.next_power_of_2(columns))


def _sizes(q: Tensor, k: Tensor, mask: LoweredMask) -> tuple[int, int, int]:
    """Sequences, and the most queries and keys of one."""
    if mask.query_starts is None:
        return q.shape[0], q.shape[2], k.shape[2]
    assert mask.max_queries is not None and mask.max_keys is not None
    return mask.query_starts.shape[0] - 1, mask.max_queries, mask.max_keys


def result(x: Tensor, width: int, mask: Prepared) -> Callable[[Tensor], Tensor]:
    """What makes the memory of a result beside a tensor like x, of its dtype: (B, H, L, width) in (B, L, H, width) memory, or
    (T, H, width). No kernel writes the rows of no sequence, which are 0."""
    whole = mask.fields.query_starts is None or mask.fields.all_rows
    if x.dim() == 3:
        H = x.shape[1]
        return lambda x: x.new_empty(x.shape[0], H, width) if whole else x.new_zeros((x.shape[0], H, width))
    B, H, L, _ = x.shape
    if mask.fields.query_starts is None:
        size, stride = (B, H, L, width), (L * H * width, width, H * width, 1)
        return lambda x: x.new_empty_strided(size, stride)

    def rows(x: Tensor) -> Tensor:
        size = 1, x.shape[2], H, width
        return (x.new_empty(size) if whole else x.new_zeros(size)).transpose(1, 2)

    return rows


def separate_results(q: Tensor, k: Tensor, v: Tensor, mask: Prepared) -> Callable[..., tuple]:
    """What makes (what is returned, dq, dk, dv)."""
    make_dq, make_dk, make_dv = (result(x, x.shape[-1], mask) for x in (q, k, v))

    def make(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        grads = make_dq(q), make_dk(k), make_dv(v)
        return grads, *grads

    return make


def joined_results(q: Tensor, mask: Prepared) -> Callable[..., tuple]:
    """The same in one memory, of q, k and v of one shape."""
    whole = mask.fields.query_starts is None or mask.fields.all_rows
    width = q.shape[-1] * q.shape[-3 if q.dim() == 4 else -2]

    def make(q: Tensor, *_: Tensor) -> tuple:
        tokens = q.shape[0] * q.shape[2] if q.dim() == 4 else q.shape[0]
        matrix = q.new_empty((tokens, 3 * width)) if whole else q.new_zeros((tokens, 3 * width))
        return matrix, *three(matrix, q.shape)

    return make


def statistics(x: Tensor, mask: Prepared, dead: float) -> Callable[[Tensor], Tensor]:
    """The same for (B, H, L), or (H, T), in fp32; `dead` in rows of no sequence."""
    H = x.shape[-3 if x.dim() == 4 else 1]
    if mask.fields.query_starts is None:
        B, _, M = x.shape[:3]
        return lambda x: x.new_empty(B, H, M, dtype=torch.float32)  # PyTorch reads numbers faster than a tuple of them
    whole = mask.fields.all_rows

    def rows(x: Tensor) -> Tensor:
        size = (1, H, x.shape[2]) if x.dim() == 4 else (H, x.shape[0])
        return x.new_empty(size, dtype=torch.float32) if whole else x.new_full(size, dead, dtype=torch.float32)

    return rows


def _classed_sizes(q: Tensor, k: Tensor, mask: LoweredMask) -> tuple[int, int]:
    """Queries and keys by which tiles are chosen: of packed sequences as many as any has that a plan serves."""
    _, M, N = _sizes(q, k, mask)
    return (M, N) if mask.query_starts is None else (classed(M), classed(N))


def _programs(heads: int, length: int, block: int) -> int:
    """One program per head and block of rows, all on the grid's first axis: the others end at 65,535."""
    return heads * triton.cdiv(length, block)
