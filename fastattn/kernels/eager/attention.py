"""The eager backend: the specification of `fastattn.reference`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask, packed_rows


def unsupported(problem) -> list[str]:
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool, extras: Extras = NO_EXTRAS
) -> tuple[Tensor, Tensor]:
    if mask.query_starts is not None:
        return _forward_packed(q, k, v, mask, scale, extras)
    out, lse = reference.attention(q, k, v, mask, scale, extras)
    return _heads_inside(out), lse


def backward(
    dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS, bias_grad: bool = False
) -> tuple:
    """dq, dk, dv, and with `bias_grad` that of extras' bias or table."""
    given = dout, dlse, q, k, v, out, lse, mask, scale, extras
    if mask.query_starts is not None:
        *grads, dbias = _backward_packed(*given)
    else:
        *grads, dbias = reference.attention_backward(*given)
        grads = [_heads_inside(grad) for grad in grads]
    return (*grads, dbias) if bias_grad else tuple(grads)


def _forward_packed(q, k, v, mask: LoweredMask, scale: float, extras: Extras) -> tuple[Tensor, Tensor]:
    """The padded problem that the packed one stands for."""
    queries, keys, mask, extras, a = _padded_problem(q, k, mask, extras)
    out, lse = reference.attention(_pad(q, queries), _pad(k, keys), _pad(v, keys), mask, scale, extras, a)
    return _pack(out, queries, q.shape[2]), _pack(lse[..., None], queries, q.shape[2], float("-inf"))[..., 0].contiguous()


def _backward_packed(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float, extras: Extras) -> tuple:
    queries, keys, mask, extras, a = _padded_problem(q, k, mask, extras)
    dlse = None if dlse is None else _pad(dlse[..., None], queries)[..., 0]
    dout, out, lse = _pad(dout, queries), _pad(out, queries), _pad(lse[..., None], queries, float("-inf"))[..., 0]
    *grads, dbias = reference.attention_backward(
        dout, dlse, _pad(q, queries), _pad(k, keys), _pad(v, keys), out, lse, mask, scale, extras, a
    )  # fmt: skip
    packed = (_pack(grad, rows, x.shape[2]) for grad, rows, x in zip(grads, (queries, keys, keys), (q, k, v), strict=True))
    return (*packed, dbias)


def _padded_problem(
    q: Tensor, k: Tensor, mask: LoweredMask, extras: Extras
) -> tuple[Tensor, Tensor, LoweredMask, Extras, Tensor]:
    """Rows of q and of k for each rank of each sequence, see `packed_rows`, the mask with what is beyond the ends hidden, the
    kept bits by rank, and N - M of each sequence, (B, 1, 1, 1)."""
    Tq, Tk = q.shape[2], k.shape[2]
    queries = packed_rows(mask.query_starts, mask.max_queries, Tq)
    keys = packed_rows(mask.key_starts, mask.max_keys, Tk)
    query_count, key_count = ((rows < T).sum(1).int() for rows, T in ((queries, Tq), (keys, Tk)))
    query_end = query_count if mask.query_end is None else torch.minimum(query_count, mask.query_end)
    key_end = key_count if mask.key_end is None else torch.minimum(key_count, mask.key_end)
    if extras.kept is not None:
        extras = extras._replace(kept=_pad(extras.kept[None], queries))
    a = (key_count - query_count)[:, None, None, None]
    return queries, keys, mask._replace(query_end=query_end, key_end=key_end), extras, a


def _pad(x: Tensor, rows: Tensor, value: float = 0) -> Tensor:
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
