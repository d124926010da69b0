"""The eager backend: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import LoweredMask, packed_rows


def unsupported(problem) -> list[str]:
    return []


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    if mask.query_starts is not None:
        return _forward_packed(q, k, v, mask, scale)
    out, lse = reference.attention(q, k, v, mask, scale)
    return _heads_inside(out), lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if mask.query_starts is not None:
        return _backward_packed(dout, dlse, q, k, v, out, lse, mask, scale)
    dq, dk, dv = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, scale)
    return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)


def _forward_packed(q, k, v, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    """The padded problem that the packed one stands for."""
    queries, keys, mask = _padded_problem(q, k, mask)
    out, lse = reference.attention(_pad(q, queries), _pad(k, keys), _pad(v, keys), mask, scale)
    return _pack(out, queries, q.shape[2]), _pack(lse[..., None], queries, q.shape[2], float("-inf"))[..., 0].contiguous()


def _backward_packed(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, mask = _padded_problem(q, k, mask)
    dlse = None if dlse is None else _pad(dlse[..., None], queries)[..., 0]
    dout, out, lse = _pad(dout, queries), _pad(out, queries), _pad(lse[..., None], queries, float("-inf"))[..., 0]
    grads = reference.attention_backward(
        dout, dlse, _pad(q, queries), _pad(k, keys), _pad(v, keys), out, lse, mask, scale
    )  # fmt: skip
    dq, dk, dv = (_pack(grad, rows, x.shape[2]) for grad, rows, x in zip(grads, (queries, keys, keys), (q, k, v), strict=True))
    return dq, dk, dv


def _padded_problem(q: Tensor, k: Tensor, mask: LoweredMask) -> tuple[Tensor, Tensor, LoweredMask]:
    """Rows of q and of k for each rank of each sequence, see `packed_rows`, and the mask with what is beyond the ends hidden."""
    Tq, Tk = q.shape[2], k.shape[2]
    queries = packed_rows(mask.query_starts, mask.max_queries, Tq)
    keys = packed_rows(mask.key_starts, mask.max_keys, Tk)
    query_end, key_end = ((rows < T).sum(1).int() for rows, T in ((queries, Tq), (keys, Tk)))
    if mask.query_end is not None:
        query_end = torch.minimum(query_end, mask.query_end)
    if mask.key_end is not None:
        key_end = torch.minimum(key_end, mask.key_end)
    return queries, keys, mask._replace(query_end=query_end, key_end=key_end)


def _pad(x: Tensor, rows: Tensor, value: float = 0.0) -> Tensor:
    """(1, H, T, D) -> (B, H, L, D), `value` where there is no row."""
    return torch.cat([x[0], x.new_full((x.shape[1], 1, x.shape[3]), value)], 1)[:, rows].transpose(0, 1)


def _pack(x: Tensor, rows: Tensor, T: int, value: float = 0.0) -> Tensor:
    """(B, H, L, D) -> (1, H, T, D) in (1, T, H, D) memory, `value` in rows of no sequence."""
    packed = x.new_full((T + 1, x.shape[1], x.shape[3]), value)
    packed[rows.flatten()] = x.transpose(1, 2).flatten(0, 1)
    return packed[:T].transpose(0, 1)[None]


def _heads_inside(x: Tensor) -> Tensor:
    """(B, H, L, D) in (B, L, H, D) memory, the layout in which models go on."""
    B, H, L, D = x.shape
    return torch.empty(B, L, H, D, dtype=x.dtype, device=x.device).transpose(1, 2).copy_(x)
