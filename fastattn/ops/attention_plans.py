"""Plans of attention: what is asked of a backend, the keys of calls, and the backends' functions behind them.

Tensors are (B, H, L, D), or with a packing (T, H, D), of whose rows no plan knows how many there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, Prepared, batched, side_by_side
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
    bias: bool = False  # a tensor
    relative: bool = False  # a table by distance
    alibi: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        mask = [name for name in ("band", "prefix", "ranges", "keys", "documents", "bits") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.B} H={self.H} M={self.M} N={self.N} D={self.D}"
        sizes += f" Hkv={self.Hkv}" * (self.Hkv != self.H) + f" Dv={self.Dv}" * (self.Dv != self.D)
        extras = "".join(f", {name}" for name in ("bias", "relative", "alibi", "dropout") if getattr(self, name))
        name = f"{'varlen_' * self.packed}attention"
        return f"{name}({sizes}, {dtype}, {self.device}, mask: {' & '.join(mask) or 'none'}{extras})"


def problem_of(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, extras: Extras = NO_EXTRAS) -> AttentionProblem:
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
        bias=extras.bias is not None,
        relative=extras.table is not None,
        alibi=extras.slopes is not None,
        dropout=extras.kept is not None,
    )  # fmt: skip


UNWANTED, SAVED, EXACT = range(3)  # the log-sum-exp: for nobody, for the backward, for the caller
NO_MASK = Prepared(LoweredMask())


def plan_with_qkv_bias(q, k, v, mask: Prepared, scale: float, backend: str, lse: int, qkv_bias: Tensor):
    """(q, k, v, mask, qkv_bias=) -> out, lse or None: of a backend that adds the bias itself, (3, H, D) and contiguous, and
    leaves that of k, which changes no weight, out of lse. None where another backend serves the call."""
    problem = problem_of(batched(q), batched(k), batched(v), mask.fields)
    module: Any = dispatch.choose("attention", BACKENDS, backend, problem)
    if not getattr(module, "ADDS_QKV_BIAS", False) or q.stride(-1) != 1:
        return None
    key = "qkv_bias", forward_key(q, k, v, mask, scale, backend, lse), unaligned(qkv_bias)
    made = PLANS.get(key)
    return made or keep(key, module.forward_plan(q, k, v, mask, scale, False, lse != UNWANTED, qkv_bias=qkv_bias))


def forward_by_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int, extras: Extras = NO_EXTRAS):
    plan = plan_of(q, k, v, mask, scale, backend, lse, extras)
    return plan(q, k, v, mask) if extras is NO_EXTRAS else plan(q, k, v, mask, extras=extras)


def plan_of(q, k, v, mask: Prepared, scale: float, backend: str, lse: int, extras: Extras = NO_EXTRAS):
    """(q, k, v, mask), with extras also extras=, -> out, lse or None."""
    key: tuple = "op", forward_key(q, k, v, mask, scale, backend, lse)  # whose tensors nobody checked
    if extras is not NO_EXTRAS:
        key = *key, extras_key(extras)
    return PLANS.get(key) or keep(key, forward_plan(q, k, v, mask, scale, backend, lse, extras))


def extras_key(extras: Extras) -> tuple:
    """What plans depend on. Of packed sequences the kept bits have as many rows as q."""
    bias, table, buckets, slopes, bottom_right, kept, dropout = extras
    lie = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.is_neg()) for x in extras[:4])
    return (
        lie, bottom_right, None if kept is None else (kept.dim(), kept.shape[-1]), dropout,
        unaligned(bias, table, buckets, slopes, kept),
    )  # fmt: skip


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


def forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int, extras: Extras = NO_EXTRAS):
    if not all(x.stride(-1) == 1 for x in (q, k, v)):
        plan = _unit_forward_plan(_unit_stride(q), _unit_stride(k), _unit_stride(v), mask, scale, backend, lse, extras)
        return lambda q, k, v, mask, **extras: plan(*map(_unit_stride, (q, k, v)), mask, **extras)
    return _unit_forward_plan(q, k, v, mask, scale, backend, lse, extras)


def _unit_forward_plan(q, k, v, mask: Prepared, scale: float, backend: str, lse: int, extras: Extras):
    problem = problem_of(batched(q), batched(k), batched(v), mask.fields, extras)
    module = dispatch.choose("attention", BACKENDS, backend, problem)
    added = () if extras is NO_EXTRAS else (extras,)
    if hasattr(module, "forward_plan"):
        return module.forward_plan(q, k, v, mask, scale, lse == EXACT, lse != UNWANTED, *added)
    exact = lse == EXACT or (lse == SAVED and extras is not NO_EXTRAS)  # the backward of extras makes weights of it
    if q.dim() == 4:
        return lambda q, k, v, mask, extras=NO_EXTRAS: module.forward(q, k, v, mask.fields, scale, exact, extras)

    def packed(q, k, v, mask, extras=NO_EXTRAS):
        out, statistics = module.forward(batched(q), batched(k), batched(v), mask.fields, scale, exact, extras)
        return out[0].transpose(0, 1), statistics[0]

    return packed


def backward_by_plan(
    dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, extras: Extras = NO_EXTRAS, bias_grad: bool = False
):
    given = dout, dlse, q, k, v, out, lse
    plan = backward_plan_of(*given, mask, scale, backend, False, extras, bias_grad)
    return plan(*given, mask) if extras is NO_EXTRAS else plan(*given, mask, extras)


def backward_plan_of(
    dout, dlse, q, k, v, out, lse, mask: Prepared, scale: float, backend: str, joined: bool,
    extras: Extras = NO_EXTRAS, bias_grad: bool = False,
):  # fmt: skip
    """(dout, dlse, q, k, v, out, lse, mask), with extras also them, -> dq, dk, dv; joined: as one matrix. With `bias_grad` that
    of the bias or the table is last."""
    given = dout, dlse, q, k, v, out, lse
    address = dout.data_ptr() | out.data_ptr() | lse.data_ptr() | (0 if dlse is None else dlse.data_ptr())
    key: tuple = (
        forward_key(q, k, v, mask, scale, backend, dout.stride()), dout.dtype, out.stride(), lse.is_contiguous(),
        None if dlse is None else dlse.is_contiguous(), joined, address & 15 and unaligned(dout, out, lse, dlse),
    )  # fmt: skip
    if extras is not NO_EXTRAS:
        key = *key, extras_key(extras), bias_grad
    return PLANS.get(key) or keep(key, _backward_plan(*given, mask, scale, backend, joined, extras, bias_grad))


def _backward_plan(dout, dlse, q, k, v, out, lse, mask: Prepared, scale, backend, joined: bool, extras: Extras, bias_grad: bool):
    given, rest = (dout, dlse, q, k, v, out, lse), (mask, scale, backend, joined, extras, bias_grad)
    if lse.is_contiguous() and (dlse is None or dlse.is_contiguous()) and all(x.stride(-1) == 1 for x in (dout, q, k, v, out)):
        return _unit_backward_plan(given, *rest)
    plan = _unit_backward_plan(_laid_out(*given), *rest)
    return lambda *given: plan(*_laid_out(*given[:7]), *given[7:])


def _laid_out(dout, dlse, q, k, v, out, lse) -> tuple:
    dout, q, k, v, out = map(_unit_stride, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse.contiguous()


def _unit_backward_plan(given: tuple, mask: Prepared, scale: float, backend: str, joined: bool, extras: Extras, bias_grad: bool):
    _, _, q, k, v, _, _ = given
    problem = problem_of(batched(q), batched(k), batched(v), mask.fields, extras)
    module = dispatch.choose("attention", BACKENDS, backend, problem)
    added = () if extras is NO_EXTRAS else (extras, bias_grad)
    if hasattr(module, "joined_results") and joined:
        return module.backward_plan(*given, mask, scale, joined, *added)
    if joined:
        plan = _unit_backward_plan(given, mask, scale, backend, False, extras, bias_grad)
        return lambda *given: _joined(plan(*given), bias_grad)
    if hasattr(module, "backward_plan"):
        return module.backward_plan(*given, mask, scale, *((False, *added) if added else ()))

    def dense(*given):
        return module.backward(*given[:7], given[7].fields, scale, *((given[8], bias_grad) if added else ()))

    def packed(*given):
        grads = dense(*as_one_sequence(*given[:7]), *given[7:])
        return (*(grad[0].transpose(0, 1) for grad in grads[:3]), *grads[3:])

    return dense if q.dim() == 4 else packed


def _joined(grads: tuple, bias_grad: bool) -> Any:
    matrix = side_by_side(*grads[:3])
    return (matrix, grads[3]) if bias_grad else matrix


def as_one_sequence(dout, dlse, q, k, v, out, lse) -> tuple:
    """Packed tensors, (T, H, D) and (H, T), as those of one sequence, (1, H, T, D) and (1, H, T)."""
    if q.dim() == 4:
        return dout, dlse, q, k, v, out, lse
    dout, q, k, v, out = map(batched, (dout, q, k, v, out))
    return dout, None if dlse is None else dlse[None], q, k, v, out, lse[None]


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but read the last dimension as adjacent elements. (Of one element any stride is right, but
    PyTorch's CPU kernel lays its output out by it.) A copy lies as tokens do, so that no step depends on how many there are."""
    if x.stride(-1) == 1:
        return x
    if x.shape[-1] == 1:
        return x.resolve_neg().as_strided(x.shape, (*x.stride()[:-1], 1))
    return x.contiguous() if x.dim() == 3 else x.transpose(1, 2).contiguous().transpose(1, 2)
