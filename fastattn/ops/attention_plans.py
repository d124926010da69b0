"""Plans of attention: what is asked of a backend, the keys of calls, and the backends' functions behind them.

Tensors are (B, H, L, D), or with a packing (T, H, D), of whose rows no plan knows how many there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.lowering import LoweredMask, Prepared, batched, side_by_side
from fastattn.ops import dispatch
from fastattn.planned import PLANS, fp32_precision, keep, unaligned, without_memory

# In order of preference. On an H100 `triton` is faster than `cuda` on every shape that was timed, from 50 keys to 1,024, forward
# and backward (benchmarks/results/h100: a test holds the order to it), although `cuda` moves fewer bytes up to 288 keys. No other
# GPU was timed; the order is the same there, as the count of bytes, the only reason for another one, did not decide here.
BACKENDS = ("triton", "cuda", "cpu", "eager")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """One request, from metadata alone: what a backend accepts or refuses, and what its config depends on."""

    device: str
    dtype: torch.dtype
    B: int
    H: int
    M: int
    N: int
    D: int
    Hkv: int  # heads of k and v
    Dv: int  # head dimension of v
    band: bool = False  # low or high
    prefix: bool = False
    ranges: bool = False  # key_begin, key_end or query_end
    keys: bool = False
    documents: bool = False
    bits: bool = False
    packed: bool = False  # B sequences laid end to end, of at most M queries and N keys

    def __str__(self) -> str:
        mask = [name for name in ("band", "prefix", "ranges", "keys", "documents", "bits") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.B} H={self.H} M={self.M} N={self.N} D={self.D}"
        sizes += f" Hkv={self.Hkv}" * (self.Hkv != self.H) + f" Dv={self.Dv}" * (self.Dv != self.D)
        return f"{'varlen_' * self.packed}attention({sizes}, {dtype}, {self.device}, mask: {' & '.join(mask) or 'none'})"


def problem_of(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> AttentionProblem:
    B, H, M, D = q.shape
    N = k.shape[2]
    if mask.query_starts is not None:
        assert mask.max_queries is not None and mask.max_keys is not None
        B, M, N = mask.query_starts.shape[0] - 1, mask.max_queries, mask.max_keys
    return AttentionProblem(
        q.device.type, q.dtype, B, H, M, N, D, k.shape[1], v.shape[3],
        band=mask.low is not None or mask.high is not None,
        prefix=mask.prefix is not None,
        ranges=mask.key_begin is not None or mask.key_end is not None or mask.query_end is not None,
        keys=mask.keys is not None,
        documents=mask.ids is not None,
        bits=mask.bits is not None,
        packed=mask.query_starts is not None,
    )  # fmt: skip


UNWANTED, SAVED, EXACT = range(3)  # the log-sum-exp: for nobody, for the backward, for the caller
NO_MASK = Prepared(LoweredMask())


def forward_by_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    return plan_of(q, k, v, mask, scale, backend, lse)(q, k, v, mask)


def plan_of(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    """(q, k, v, mask) -> out, lse or None."""
    key = "op", forward_key(q, k, v, mask, scale, backend, lse)  # whose tensors nobody checked
    return PLANS.get(key) or keep(key, forward_plan(q, k, v, mask, scale, backend, lse))


def forward_key(q, k, v, mask: Prepared, scale: float | None, backend: str, lse: Any) -> tuple:
    if not mask.packed:
        sizes: Any = q.shape, k.shape, v.shape
    else:
        sizes = tuple((x.shape[-3 if x.dim() == 4 else -2], x.shape[-1], x.dim()) for x in (q, k, v))
    dtype, at_q, at_k, at_v = q.dtype, q.data_ptr(), k.data_ptr(), v.data_ptr()
    return (
        sizes, q.stride(), k.stride(), v.stride(), dtype, k.dtype, v.dtype, q.device, k.get_device(), v.get_device(), mask.key,
        scale, backend, lse, (at_q | at_k | at_v) & 15 and unaligned(q, k, v), fp32_precision(dtype),
        (at_q and at_k and at_v and True) or without_memory(q, k, v), q.is_neg(), k.is_neg(), v.is_neg(),
    )  # fmt: skip


def forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    if not all(x.stride(-1) == 1 for x in (q, k, v)):
        plan = _unit_forward_plan(_unit_stride(q), _unit_stride(k), _unit_stride(v), mask, scale, backend, lse)
        return lambda q, k, v, mask: plan(*map(_unit_stride, (q, k, v)), mask)
    return _unit_forward_plan(q, k, v, mask, scale, backend, lse)


def _unit_forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int):
    module = dispatch.choose("attention", BACKENDS, backend, problem_of(batched(q), batched(k), batched(v), mask.fields))
    if hasattr(module, "forward_plan"):
        return module.forward_plan(q, k, v, mask, scale, lse == EXACT, lse != UNWANTED)
    if q.dim() == 4:
        return lambda q, k, v, mask: module.forward(q, k, v, mask.fields, scale, lse == EXACT)

    def packed(q, k, v, mask):
        out, statistics = module.forward(batched(q), batched(k), batched(v), mask.fields, scale, lse == EXACT)
        return out[0].transpose(0, 1), statistics[0]

    return packed


def backward_by_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str):
    given = dout, dlse, q, k, v, out, lse
    return backward_plan_of(*given, mask, scale, backend, False)(*given, mask)


def backward_plan_of(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool):
    """(dout, dlse, q, k, v, out, lse, mask) -> dq, dk, dv; or joined, as one matrix."""
    given = dout, dlse, q, k, v, out, lse
    address = dout.data_ptr() | out.data_ptr() | lse.data_ptr() | (0 if dlse is None else dlse.data_ptr())
    key = (
        forward_key(q, k, v, mask, scale, backend, dout.stride()), dout.dtype, out.stride(), lse.is_contiguous(),
        None if dlse is None else dlse.is_contiguous(), joined, address & 15 and unaligned(dout, out, lse, dlse),
    )  # fmt: skip
    return PLANS.get(key) or keep(key, _backward_plan(*given, mask, scale, backend, joined))


def _backward_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool):
    given = dout, dlse, q, k, v, out, lse
    if lse.is_contiguous() and (dlse is None or dlse.is_contiguous()) and all(x.stride(-1) == 1 for x in (dout, q, k, v, out)):
        return _unit_backward_plan(given, mask, scale, backend, joined)
    plan = _unit_backward_plan(_laid_out(*given), mask, scale, backend, joined)
    return lambda *given: plan(*_laid_out(*given[:-1]), given[-1])


def _laid_out(dout, dlse, q, k, v, out, lse) -> tuple:
    dout, q, k, v, out = map(_unit_stride, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse.contiguous()


def _unit_backward_plan(given: tuple, mask: Prepared, scale: float, backend: str, joined: bool):
    _, _, q, k, v, _, _ = given
    module = dispatch.choose("attention", BACKENDS, backend, problem_of(batched(q), batched(k), batched(v), mask.fields))
    if hasattr(module, "joined_results") and joined:
        return module.backward_plan(*given, mask, scale, joined)
    if joined:
        plan = _unit_backward_plan(given, mask, scale, backend, False)
        return lambda *given: side_by_side(*plan(*given))
    if hasattr(module, "backward_plan"):
        return module.backward_plan(*given, mask, scale)
    if q.dim() == 4:
        return lambda *given: module.backward(*given[:-1], given[-1].fields, scale)

    def packed(*given):
        grads = module.backward(*as_one_sequence(*given[:-1]), given[-1].fields, scale)
        return tuple(grad[0].transpose(0, 1) for grad in grads)

    return packed


def as_one_sequence(dout, dlse, q, k, v, out, lse) -> tuple:
    """Packed tensors, (T, H, D) and (H, T), as those of one sequence, (1, H, T, D) and (1, H, T)."""
    if q.dim() == 4:
        return dout, dlse, q, k, v, out, lse
    dout, q, k, v, out = map(batched, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse[None], q, k, v, out, lse[None]


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but read the last dimension as adjacent elements. (Of one element any stride is right, but
    PyTorch's CPU kernel lays its output out by it.)"""
    if x.stride(-1) == 1:
        return x
    return x.resolve_neg().as_strided(x.shape, (*x.stride()[:-1], 1)) if x.shape[-1] == 1 else x.contiguous()
