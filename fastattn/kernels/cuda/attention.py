"""The cuda backend of attention: the CUDA C++ kernels of csrc/attention.

Backward, short sequences take one kernel that holds all keys of a head, others one for dq and one for dk and dv.

A plan is made from one call's tensors and serves every call of equal metadata: of all tensors, the mask's too, the shapes,
strides, dtype, device and whether addresses are multiples of 16; which fields the mask has, and its integers. Packed sequences
may have another number of rows in each call, another stride(0), and so other strides of lse. What can be worked out is worked
out once; a call allocates its results, collects addresses and launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.cuda import library
from fastattn.lowering import TILE as MASK_TILE
from fastattn.lowering import LoweredMask, Prepared, batched
from fastattn.plans import KernelPlan, tensor_bytes

HEAD_DIMS = (32, 64, 128)
INT32_MAX = 2**31 - 1
MOST_KEYS = {32: 256, 64: 256, 128: 128}  # of the one-kernel backward, by head dimension: eight warps' registers
MOST_QUERIES = 1024  # of the same: a block walks over all queries of a head, and with more of them two kernels have more blocks
MOST_SIZES = 256  # of packed batches, whose requests a plan keeps
EMULATED_SHARED = 227 * 1024  # bytes of shared memory that a block may have in the emulator, as on an H100

Forward = Callable[[Tensor, Tensor, Tensor, Prepared], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Prepared], Gradients]


def unsupported(problem) -> list[str]:
    reasons = library.problems(problem.device)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{problem.dtype} is not served: the CUDA kernels take fp16 and bf16")
    if problem.D not in HEAD_DIMS:
        reasons.append(f"head dimension {problem.D} is not 32, 64 or 128")
    if problem.Dv != problem.D:
        reasons.append(f"v has head dimension {problem.Dv} and q {problem.D}: the CUDA kernels take equal ones")
    if problem.dropout or problem.bias or problem.relative or problem.alibi:
        reasons.append("a bias or dropout is not served: the CUDA kernels take masks alone")
    if max(problem.B, problem.H, problem.M, problem.N) > INT32_MAX:
        reasons.append("a size is beyond 2^31 - 1")
    return reasons


def forward_plan(q: Tensor, k: Tensor, v: Tensor, mask: Prepared, scale: float, exact_lse: bool, want_lse: bool) -> Forward:
    """What computes out (B, H, M, D) and lse (B, H, M) of q, k, v and mask: of these, and of others with equal metadata.

    lse is exact whether or not `exact_lse` asks for it, and made whether or not anybody wants it. Packed q, k, v and out may be
    (T, H, D), lse then (H, T).
    """
    if mask.fields.query_starts is not None:
        return _by_lengths(lambda q, k, v, mask: _forward_plan(q, k, v, mask.fields, scale))
    return _forward_plan(q, k, v, mask.fields, scale)


def backward_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float) -> Backward:
    """What computes dq, dk and dv, of the shapes of q, k and v, of these tensors, and of others with equal metadata."""
    if mask.fields.query_starts is not None:
        return _by_lengths(lambda *given: _backward_plan(*given[:-1], given[-1].fields, scale))
    return _backward_plan(dout, dlse, q, k, v, out, lse, mask.fields, scale)


def _by_lengths(make: Callable[..., Any]) -> Callable[..., Any]:
    """A request knows how many packed sequences there are and the most queries and keys of one, which no plan's key does."""
    made: dict[tuple, Any] = {}

    def call(*given: Any) -> Any:
        fields = given[-1].fields
        sizes = fields.query_starts.shape[0], fields.max_queries, fields.max_keys
        if sizes not in made:
            if len(made) >= MOST_SIZES:
                made.clear()
            made[sizes] = make(*given)
        return made[sizes](*given)

    return call


def _forward_plan(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float) -> Forward:
    packed, whole, fields = mask.query_starts is not None, _whole(mask), _tensor_fields(mask)
    rows_first, (q, k, v) = q.dim() == 3, map(batched, (q, k, v))
    kernel = None
    if min(_sizes(q, k, mask)[:3]) > 0:
        names = ("q", "k", "v", "out", "lse", *(LoweredMask._fields[i] for i in fields))
        request = _request("AttentionForward", (q, k, v), mask, scale)
        kernel = library.Kernel("attention_forward", request, q.device, names, ("out", "lse"), whole)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Prepared) -> tuple[Tensor, Tensor]:
        if rows_first:
            q, k, v = batched(q), batched(k), batched(v)
        out, lse = _result(q, whole), q.new_empty(q.shape[:3], dtype=torch.float32)
        if not whole:
            lse.fill_(float("-inf"))
        if kernel is not None:
            rows = (q.shape[2], k.shape[2]) if packed else ()
            library.launch(kernel, [q, k, v, out, lse, *_tensors(mask.fields, fields)], *rows)
        return (out[0].transpose(0, 1), lse[0]) if rows_first else (out, lse)

    return call


def _backward_plan(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> Backward:
    packed, whole, fields = mask.query_starts is not None, _whole(mask), _tensor_fields(mask)
    rows_first, (dout, q, k, v, out) = q.dim() == 3, map(batched, (dout, q, k, v, out))
    B, H, M, N, D = _sizes(q, k, mask)
    single = one_kernel(D, M, N, shared_memory(q.device))
    kernel = None
    if min(B, H, M, N) > 0:
        request = _request("AttentionBackward", (q, k, v, out, dout), mask, scale, dlse=dlse is not None, single=single)
        written = ("dq", "dk", "dv") if single else ("dq", "dk", "dv", "delta")
        optional = () if dlse is None else ("dlse",)
        names = ("q", "k", "v", "out", "dout", "lse", *optional, *written, *(LoweredMask._fields[i] for i in fields))
        name = "attention_backward_single" if single else "attention_backward"
        kernel = library.Kernel(name, request, q.device, names, written, whole)

    def call(dout, dlse, q, k, v, out, lse, mask: Prepared) -> Gradients:
        if rows_first:
            dout, q, k, v, out = map(batched, (dout, q, k, v, out))
        dq, dk, dv = _result(q, whole), _result(k, whole), _result(v, whole)
        if kernel is None:
            dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
        else:
            statistics = [lse.contiguous()] if dlse is None else [lse.contiguous(), dlse.contiguous()]
            delta = [] if single else [lse.new_empty(lse.shape)]
            rows = (q.shape[2], k.shape[2]) if packed else ()
            tensors = [q, k, v, out, dout, *statistics, dq, dk, dv, *delta, *_tensors(mask.fields, fields)]
            library.launch(kernel, tensors, *rows)
        return (dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)) if rows_first else (dq, dk, dv)

    return call


def plan(problem, backward: bool) -> list[KernelPlan]:
    """The kernels of a pass: for the GPU that is there, else for an H100."""
    M, N, D = problem.M, problem.N, problem.D
    shared = _gpu_shared_memory(torch.cuda.current_device()) if torch.cuda.is_available() else EMULATED_SHARED
    group, key_tiles, query_tiles = problem.H // max(problem.Hkv, 1), -(-N // MASK_TILE), -(-M // MASK_TILE)
    banded = problem.band or problem.prefix or problem.documents or problem.bits
    q, out, keys, lse = tensor_bytes(problem)
    if not backward:
        capacity, warps, rows, used = library.host_module().attention_forward_config(D, M, N, shared)
        name = f"attention_forward_{'resident' if capacity else 'streaming'}_kernel"
        config = f"{warps} warps, {rows} queries a block, {used} bytes of shared memory"
        moved = q + out + lse + keys * group * -(-M // rows)
        # the last eight keys of a run are a step of their own where keys are resident
        return [KernelPlan(name, config, 16, 8 if capacity and not banded else 16, (1, 1), moved)]
    if one_kernel(D, M, N, shared):
        slab = slab_keys(D)
        config = f"{-(-N // slab)} warps, {single_bytes(D, N)} bytes of shared memory"
        moved = 2 * (q + out + keys) + lse
        return [KernelPlan("attention_backward_single_kernel", config, 16, slab if banded else 16, (3, 2), moved)]
    dq_moved = 2 * (q + out) + 2 * lse + keys * group * query_tiles
    dkdv_moved = 2 * keys + (q + out + 2 * lse) * key_tiles
    return [
        KernelPlan("attention_backward_dq_kernel", "4 warps", 16, 16, (2, 1), dq_moved),
        KernelPlan("attention_backward_dkdv_kernel", "4 warps", 16, 16, (2, 2), dkdv_moved),
    ]


def one_kernel(D: int, M: int, N: int, shared: int) -> bool:
    """Whether the backward is one kernel, where a block may have `shared` bytes of shared memory."""
    return MOST_KEYS[D] >= N and M <= MOST_QUERIES and single_bytes(D, N) <= shared


def single_bytes(D: int, N: int) -> int:
    """Of shared memory, laid out in csrc/attention/backward_single.cu: what each key needs, and what a tile of queries does."""
    keys = -(-N // slab_keys(D)) * slab_keys(D)
    return keys * (4 * D + 96) + 320 * D + 512


def slab_keys(D: int) -> int:
    """Keys of a warp of the one-kernel backward."""
    return 16 if D == 128 else 32


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return EMULATED_SHARED if device.type == "cpu" else _gpu_shared_memory(device.index)


@functools.cache
def _gpu_shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def _sizes(q: Tensor, k: Tensor, mask: LoweredMask) -> tuple[int, int, int, int, int]:
    """B, H, M, N, D: of packed sequences their number and the most queries and keys of one."""
    _, H, rows, D = q.shape
    if mask.query_starts is None:
        return q.shape[0], H, rows, k.shape[2], D
    assert mask.max_queries is not None and mask.max_keys is not None
    return mask.query_starts.shape[0] - 1, H, mask.max_queries, mask.max_keys, D


def _whole(mask: LoweredMask) -> bool:
    """Whether kernels write every row of a result. The others are 0, and lse there -inf."""
    return mask.query_starts is None or bool(mask.all_rows)


def _result(x: Tensor, whole: bool) -> Tensor:
    """For a result of x's shape (B, H, L, D), in (B, L, H, D) memory."""
    B, H, L, D = x.shape
    row = max(H, 1) * D
    result = x.new_empty_strided((B, H, L, D), (max(L, 1) * row, D, row, 1))
    return result if whole else result.zero_()


def _request(form: str, heads: tuple[Tensor, ...], mask: LoweredMask, scale: float, **options: bool) -> Any:
    """The binding's request; `heads` are q, k and what else it takes of their form."""
    q, k = heads[:2]
    B, H, M, N, D = _sizes(q, k, mask)
    strides = [_strides(x) for x in heads]
    return getattr(library.compiled(q.device), form)(
        *strides,
        mask=_mask(mask),
        scale=scale,
        sizes=(B, H, k.shape[1], M, N, D),
        bfloat16=q.dtype == torch.bfloat16,
        aligned=all(map(library.rows_aligned, heads, strides)),
        **options,
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and row of a (B, H, L, D) tensor."""
    batch, head, row, _ = x.stride()
    return batch if x.shape[0] > 1 else 0, head, row


def _clamped(bound: int | None) -> int | None:
    """No j - i is as far from 0 as INT32_MAX."""
    return None if bound is None else max(-INT32_MAX, min(bound, INT32_MAX))


def _mask(mask: LoweredMask) -> tuple:
    """The mask's part of a request, as the binding takes it: what is known of its fields without their tensors' addresses."""

    def strides(x: Tensor | None, dimensions: int) -> tuple[int, ...] | None:
        return None if x is None else tuple(0 if x.shape[i] == 1 else x.stride(i) for i in range(dimensions))

    bounds = (_clamped(bound) for bound in (mask.low, mask.high, mask.prefix_high))
    vectors = (x is not None for x in (mask.prefix, mask.key_begin, mask.key_end, mask.query_end))
    matrices = (strides(x, 2) for x in (mask.keys, mask.ids, mask.key_ids))
    tiles = (strides(x, 3) for x in (mask.key_tiles, mask.query_tiles))
    return (*bounds, *vectors, *matrices, strides(mask.bits, 4), *tiles, mask.query_starts is not None)


def _tensor_fields(mask: LoweredMask) -> list[int]:
    """Where the mask has tensors: a launch takes their addresses in this order."""
    return [i for i, x in enumerate(mask) if isinstance(x, Tensor)]


def _tensors(mask: LoweredMask, fields: list[int]) -> list[Tensor]:
    """Those of the fields. Kernels read vectors as contiguous ones, and other tensors by their strides."""
    tensors: list[Any] = [mask[i] for i in fields]
    return [x.contiguous() if x.dim() == 1 else x for x in tensors]
