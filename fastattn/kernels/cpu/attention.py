"""The cpu backend: PyTorch's flash-attention kernel for CPUs, wherever it is right.

What that kernel gets wrong or refuses is handled here: an empty M or N kills the process, a row with no visible key has
lse 0.0, bool masks are refused, NaN in a padded key leaks, lse is inexact in half precision, a causal mask with scale <= 0
gives NaN or Inf, and no gradient of the log-sum-exp is taken. Where it pays, padding is not computed: each sequence
is one call on its real keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.lowering import LoweredMask

INF = float("inf")
ROWS = 64  # rows of scores held at a time where the fused backward cannot serve
# Hidden multiply-adds of q k^T per sequence from which a call of its own, about 0.1 ms with its copies, is the cheaper way;
# half precision computes faster. Measured on two cores with AVX-512.
HIDDEN_WORK = {torch.float64: 2**22, torch.float32: 2**23, torch.bfloat16: 2**24, torch.float16: 2**24}
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def notes(problem) -> list[str]:
    return ["computed by PyTorch's flash-attention kernel for CPUs, on real tokens alone where that pays"]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    if exact_lse and q.dtype in (torch.float16, torch.bfloat16):
        # in half precision the kernel's exp is a polynomial that leaves lse 5e-5 off
        out, lse = forward(q.float(), k.float(), v.float(), mask, scale, exact_lse)
        return _heads_inside(out.to(q.dtype)), lse
    if scale <= 0:
        q, scale, _ = _positive_scale(q, scale)
    if _pads(q, k, mask):
        k, v, mask = _padded(k, v, mask)
    B, H, M, D = q.shape
    N = k.shape[2]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts = _parts(mask, B, M, N) if q.numel() and k.numel() else []
    if len(parts) == 1 and parts[0].whole(B, M, N):
        out, lse = _forward_part(q, k, v, parts[0], mask, scale)
        return _heads_inside(out), lse.contiguous()
    out = q.new_zeros(B, M, H, D).transpose(1, 2)
    lse = q.new_full((B, H, M), -INF, dtype=lse_dtype)
    for part in parts:
        part_out, part_lse = _forward_part(part.rows(q), part.columns(k), part.columns(v), part, mask, scale)
        part.rows(out).copy_(part_out)
        lse[part.batch, :, : part.queries] = part_lse
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if scale <= 0:
        q, scale, sign = _positive_scale(q, scale)
        dq, dk, dv = backward(dout, dlse, q, k, v, out, lse, mask, scale)
        return dq.mul_(sign), dk, dv
    if _pads(q, k, mask):
        k, v, mask = _padded(k, v, mask)
    B, H, M, D = q.shape
    N = k.shape[2]
    parts = _parts(mask, B, M, N) if q.numel() and k.numel() else []
    if len(parts) == 1 and parts[0].whole(B, M, N):
        return _backward_part(dout, dlse, q, k, v, out, lse, parts[0], mask, scale)
    dq, dk, dv = (x.new_zeros(B, x.shape[2], H, D).transpose(1, 2) for x in (q, k, v))
    for part in parts:
        part_dlse = None if dlse is None else part.rows(dlse)
        query_side = part.rows(dout), part_dlse, part.rows(q)
        key_side = part.columns(k), part.columns(v)
        grads = _backward_part(*query_side, *key_side, part.rows(out), part.rows(lse), part, mask, scale)
        part.rows(dq).copy_(grads[0])
        part.write_columns(dk, grads[1])
        part.write_columns(dv, grads[2])
    return dq, dk, dv


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q, scale and sign with the same scores and scale > 0: the kernel multiplies its -inf by the scale."""
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, -scale or 1.0, sign


def _pads(q: Tensor, k: Tensor, mask: LoweredMask) -> bool:
    """Whether one call that computes the padding too is cheaper than a call for each sequence."""
    if mask.query_end is not None or (mask.key_begin is None and mask.key_end is None):
        return False
    B, H, M, D = q.shape
    N = k.shape[2]
    begin = 0 if mask.key_begin is None else mask.key_begin
    live = torch.as_tensor(N if mask.key_end is None else mask.key_end.clamp(max=N)) - begin
    hidden = B * N - int((live.clamp(min=0) if mask.keys is None else mask.keys).sum())
    return 0 < H * M * D * hidden < B * HIDDEN_WORK[q.dtype]


def _padded(k: Tensor, v: Tensor, mask: LoweredMask) -> tuple[Tensor, Tensor, LoweredMask]:
    """k, v and a mask without ranges or key bits: they become a bool per key; a hidden NaN or Inf becomes 0."""
    B, _, N, _ = k.shape
    live = mask._replace(diagonal=None, pairs=None).visible(B, 1, 1, N)
    if not (k.sum().isfinite() and v.sum().isfinite()):
        hidden = ~live.mT
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return k, v, LoweredMask(diagonal=mask.diagonal, pairs=live if mask.pairs is None else mask.pairs & live)


class _Part(NamedTuple):
    """Sequences that one call of the fused kernel serves: a slice of the batch, its real queries and its real keys."""

    batch: slice
    queries: int  # rows 0 .. queries - 1
    begin: int  # keys begin .. end - 1, unless `index` lists them
    end: int
    index: Tensor | None = None

    def whole(self, B: int, M: int, N: int) -> bool:
        return self.batch == slice(0, B) and self.index is None and (self.queries, self.begin, self.end) == (M, 0, N)

    def rows(self, x: Tensor) -> Tensor:
        return x[self.batch, :, : self.queries]

    def columns(self, x: Tensor) -> Tensor:
        x = x[self.batch]
        return x[:, :, self.begin : self.end] if self.index is None else x.index_select(2, self.index)

    def write_columns(self, x: Tensor, value: Tensor) -> None:
        if self.index is None:
            x[self.batch, :, self.begin : self.end].copy_(value)
        else:
            x[self.batch].index_copy_(2, self.index, value)


def _parts(mask: LoweredMask, B: int, M: int, N: int) -> list[_Part]:
    """The calls to make. Sequences with no visible pair are left out, equal neighbours share a call."""
    if mask.key_begin is None and mask.key_end is None and mask.query_end is None:
        return [_Part(slice(0, B), M, 0, N)]
    begins = [0] * B if mask.key_begin is None else mask.key_begin.tolist()
    ends = [N] * B if mask.key_end is None else mask.key_end.clamp(max=N).tolist()
    queries = [M] * B if mask.query_end is None else mask.query_end.clamp(max=M).tolist()
    parts: list[_Part] = []
    for b in range(B):
        begin, end, index = begins[b], ends[b], None
        if mask.keys is not None and begin < end:
            live = mask.keys[b, begin:end].nonzero()[:, 0]
            if live.numel() < end - begin:
                index = live + begin
        if begin >= end or not queries[b] or (index is not None and not index.numel()):
            continue
        last = parts[-1] if parts else None
        if last is not None and index is None and last[1:] == (queries[b], begin, end, None) and last.batch.stop == b:
            parts[-1] = last._replace(batch=slice(last.batch.start, b + 1))
        else:
            parts.append(_Part(slice(b, b + 1), queries[b], begin, end, index))
    return parts


def _forward_part(q, k, v, part: _Part, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    causal, additive = _kernel_mask(part, mask, q)
    if additive is None:
        return _flash(q, k, v, 0.0, causal, scale=scale)
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=_rectangle(additive, q, k), scale=scale)
    dead = (additive == -INF).all(-1)
    if dead.any():  # there the kernel gives lse 0.0, and out from exp(-inf - -inf) in some versions
        lse = lse.masked_fill(dead, -INF)
        out = out.masked_fill(dead[..., None], 0)
    return out, lse


def _backward_part(dout, dlse, q, k, v, out, lse, part: _Part, mask: LoweredMask, scale: float):
    causal, additive = _kernel_mask(part, mask, q)
    if dlse is not None:
        return _backward_rows(dout, dlse, q, k, v, out, lse, causal, additive, scale)
    if additive is not None:
        dead = lse == -INF
        if dead.any():
            lse = lse.masked_fill(dead, 0)
            q, dout = q.masked_fill(dead[..., None], 0), dout.masked_fill(dead[..., None], 0)
        additive = _rectangle(additive, q, k)
    return _flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=additive, scale=scale)


def _backward_rows(dout, dlse, q, k, v, out, lse, causal: bool, additive: Tensor | None, scale: float):
    """The backward in blocks of rows, with delta = rowsum(dO * O) - dlse, which the fused kernel has no argument for."""
    wide = lse.dtype
    M, N = q.shape[2], k.shape[2]
    k_wide, v_wide = k.to(wide), v.to(wide)
    dq = torch.empty_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for start in range(0, M, ROWS):
        rows = slice(start, min(start + ROWS, M))
        s = q[:, :, rows].to(wide) @ k_wide.mT * scale
        if causal:
            i = torch.arange(rows.start, rows.stop)[:, None]
            s.masked_fill_(torch.arange(N) > i, -INF)
        elif additive is not None:
            s += additive if additive.shape[2] == 1 else additive[:, :, rows]
        dead = (lse[:, :, rows] == -INF)[..., None]
        p = torch.exp(s - lse[:, :, rows, None].masked_fill(dead, INF))
        do = dout[:, :, rows].to(wide).masked_fill(dead, 0)
        delta = (do * out[:, :, rows].to(wide)).sum(-1, keepdim=True) - dlse[:, :, rows, None].masked_fill(dead, 0)
        ds = p * (do @ v_wide.mT - delta) * scale
        dq[:, :, rows] = ds @ k_wide
        dk += ds.mT @ q[:, :, rows].to(wide).masked_fill(dead, 0)
        dv += p.mT @ do
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _kernel_mask(part: _Part, mask: LoweredMask, q: Tensor) -> tuple[bool, Tensor | None]:
    """What is left of the mask inside a part: the kernel's top-left causal flag, or a tensor that broadcasts to the scores."""
    if mask.diagonal is None and mask.pairs is None:
        return False, None
    keys = torch.arange(part.begin, part.end) if part.index is None else part.index
    rows = torch.arange(part.queries)[:, None]
    if mask.pairs is None:
        if part.index is None and mask.diagonal == part.begin:
            return True, None
        if part.index is None and mask.diagonal >= part.end - 1:
            return False, None  # the band hides nothing
        visible = (keys - rows <= mask.diagonal)[None, None]
    else:
        pairs = mask.pairs if mask.pairs.shape[0] == 1 else mask.pairs[part.batch]
        pairs = pairs if pairs.shape[2] == 1 else pairs[:, :, : part.queries]
        visible = pairs if pairs.shape[3] == 1 else pairs.index_select(3, keys)
        if mask.diagonal is not None:
            visible = visible & (keys - rows <= mask.diagonal)
    return False, torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -INF)


def _rectangle(additive: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The kernel wants the last two dimensions in full, without a copy."""
    return additive.expand(-1, -1, q.shape[2], k.shape[2])


def _heads_inside(x: Tensor) -> Tensor:
    """(B, H, L, D) in (B, L, H, D) memory; the kernel's output follows q's strides, so this is most often no copy."""
    B, H, L, D = x.shape
    if x.transpose(1, 2).is_contiguous():
        return x
    return x.new_empty(B, L, H, D).transpose(1, 2).copy_(x)
