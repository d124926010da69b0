"""The cuda backend of attention: the CUDA C++ kernels of csrc/attention.

Backward, short sequences take one kernel that holds all keys of a head, others one for dq and one for dk and dv.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn.kernels.cuda import library
from fastattn.lowering import TILE as MASK_TILE
from fastattn.lowering import LoweredMask
from fastattn.plans import KernelPlan, tensor_bytes

HEAD_DIMS = (32, 64, 128)
INT32_MAX = 2**31 - 1
MOST_KEYS = {32: 256, 64: 256, 128: 128}  # of the one-kernel backward, by head dimension: eight warps' registers
MOST_QUERIES = 1024  # of the same: a block walks over all queries of a head, and with more of them two kernels have more blocks
EMULATED_SHARED = 227 * 1024  # bytes of shared memory that a block may have in the emulator, as on an H100


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


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    B, H, M, N, D = _sizes(q, k, mask)
    whole = mask.query_starts is None or bool(mask.all_rows)
    out, lse = _result(q, whole), q.new_empty(q.shape[:3], dtype=torch.float32)
    if not whole:
        lse.fill_(float("-inf"))
    if out.numel() == 0 or B == 0 or M == 0:
        return out, lse
    mask_argument, mask_tensors = _mask(mask, q.shape[2], k.shape[2])
    arguments = {
        **{name: _heads(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        "lse": _statistics(lse),
        "mask": mask_argument,
        "scale": scale,
        "sizes": (B, H, k.shape[1], M, N, D),
        "bfloat16": q.dtype == torch.bfloat16,
        "aligned": library.rows_aligned(q, k, v),
    }
    library.launch("attention_forward", arguments, {"q": q, "k": k, "v": v, **mask_tensors}, {"out": out, "lse": lse}, whole)
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    B, H, M, N, D = _sizes(q, k, mask)
    whole = mask.query_starts is None or bool(mask.all_rows)
    dq, dk, dv = (_result(x, whole) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or min(B, M, N) == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    single = one_kernel(D, M, N, shared_memory(q.device))
    delta = None if single else lse.new_empty(lse.shape)
    mask_argument, mask_tensors = _mask(mask, q.shape[2], k.shape[2])
    reads = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    arguments = {
        **{name: _heads(x) for name, x in {**reads, **gradients}.items()},
        "lse": _statistics(lse),
        **{name: library.address(x) for name, x in (("dlse", dlse), ("delta", delta))},
        "mask": mask_argument,
        "scale": scale,
        "sizes": (B, H, k.shape[1], M, N, D),
        "bfloat16": q.dtype == torch.bfloat16,
        "aligned": library.rows_aligned(*reads.values()),
    }
    kernel = "attention_backward_single" if single else "attention_backward"
    reads |= {"lse": lse, "dlse": dlse, **mask_tensors}
    library.launch(kernel, arguments, reads, {**gradients, "delta": delta}, whole)
    return dq, dk, dv


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


def _result(x: Tensor, whole: bool) -> Tensor:
    """For a result of x's shape, in (B, L, H, D) memory. `whole`: kernels write every row; the others are 0."""
    result = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    return result if whole else result.zero_()


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (B, H, L, D) tensor, as the binding takes them."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch if x.shape[0] > 1 else 0, head, row


def _statistics(x: Tensor) -> tuple[int, int, int]:
    """The same of a contiguous (B, H, L)."""
    return x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def _clamped(bound: int | None) -> int | None:
    """No j - i is as far from 0 as INT32_MAX."""
    return None if bound is None else max(-INT32_MAX, min(bound, INT32_MAX))


def _mask(mask: LoweredMask, query_rows: int, key_rows: int) -> tuple[tuple, dict[str, Tensor]]:
    """The mask as the binding takes it, and its tensors, whose addresses stand in it. The rows are those of q and k."""
    tensors = {name: x for name, x in mask._asdict().items() if isinstance(x, Tensor)}
    for name in ("prefix", "key_begin", "key_end", "query_end", "query_starts", "key_starts"):
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
    bounds = (_clamped(bound) for bound in (mask.low, mask.high, mask.prefix_high))
    starts = (library.address(tensors.get(name)) for name in ("query_starts", "key_starts"))
    rows = (min(rows, INT32_MAX) for rows in (query_rows, key_rows))  # no int32 leads to a row beyond
    return (*bounds, *vectors, *matrices, strided("bits", 4), *tiles, *starts, *rows), tensors
