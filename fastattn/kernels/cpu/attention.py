"""The cpu backend: PyTorch's flash-attention kernel for CPUs, wherever it is right.

What that kernel gets wrong or refuses is handled here: an empty M or N kills the process, a row with no visible key has
lse 0.0, bool masks are refused, NaN in a padded key leaks, lse is inexact in half precision, a causal mask with scale <= 0
gives NaN or Inf, q, k and v must have one width and one number of heads, and no gradient of the log-sum-exp is taken.
Padding is not computed where that pays, and a mask is served by a call for each block of queries, on the keys that it sees:
`attention_parts` says which. No tensor has an element for each query and key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.kernels.cpu.attention_parts import HIDDEN_WORK, Block, Part, dead_rows, parts, unpacked
from fastattn.lowering import LoweredMask

INF = float("inf")
HALF = (torch.float16, torch.bfloat16)
FEW_ROWS = 32  # of q or k
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def notes(problem) -> list[str]:
    found = ["computed by PyTorch's flash-attention kernel for CPUs, on real tokens alone where that pays"]
    if problem.Dv != problem.D:
        wide, narrow = ("v", "q and k") if problem.Dv > problem.D else ("q and k", "v")
        found.append(f"{narrow} are copied to the width of {wide}".replace("v are", "v is"))
    if problem.Hkv != problem.H:
        found.append(f"{problem.H // problem.Hkv} calls, one for each query head that shares a head of k and v")
    return found


def forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool) -> tuple[Tensor, Tensor]:
    if _in_single(q, k) or (exact_lse and q.dtype in HALF):
        # in half precision the kernel's exp is a polynomial that leaves lse 5e-5 off
        out, lse = forward(q.float(), k.float(), v.float(), mask, scale, exact_lse)
        return _heads_inside(out.to(q.dtype)), lse
    if q.shape[1] != k.shape[1]:
        B, H, M, _ = q.shape
        out, lse = q.new_empty(B, M, H, v.shape[3]).transpose(1, 2), q.new_empty(B, H, M, dtype=_lse_dtype(q))
        for heads in _groups(q, k):
            out[:, heads], lse[:, heads] = forward(q[:, heads], k, v, _of_heads(mask, heads), scale, exact_lse)
        return out, lse
    if q.shape[3] != v.shape[3]:
        width = max(q.shape[3], v.shape[3])
        out, lse = forward(_widened(q, width), _widened(k, width), _widened(v, width), mask, scale, exact_lse)
        return _heads_inside(out[..., : v.shape[3]]), lse
    if scale <= 0:
        q, scale, _ = _positive_scale(q, scale)
    return _forward(q, k, v, mask, scale)


def backward(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if _in_single(q, k):
        grads = backward(dout.float(), dlse, q.float(), k.float(), v.float(), out.float(), lse, mask, scale)
        dq, dk, dv = (_heads_inside(grad.to(q.dtype)) for grad in grads)
        return dq, dk, dv
    if scale <= 0:
        q, scale, sign = _positive_scale(q, scale)
        dq, dk, dv = backward(dout, dlse, q, k, v, out, lse, mask, scale)
        return dq.mul_(sign), dk, dv
    if dlse is not None:
        return _backward_with_lse(dout, dlse, q, k, v, out, lse, mask, scale)
    if q.shape[1] != k.shape[1]:
        dq = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        dk, dv = (
            x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=_lse_dtype(q)).transpose(1, 2) for x in (k, v)
        )
        for heads in _groups(q, k):
            args = dout[:, heads], None, q[:, heads], k, v, out[:, heads], lse[:, heads], _of_heads(mask, heads), scale
            dq[:, heads], group_dk, group_dv = backward(*args)
            dk += group_dk
            dv += group_dv
        return dq, dk.to(q.dtype), dv.to(q.dtype)
    if q.shape[3] != v.shape[3]:
        width = max(q.shape[3], v.shape[3])
        dout, wide_q, wide_k, wide_v, out = (_widened(x, width) for x in (dout, q, k, v, out))
        grads = backward(dout, None, wide_q, wide_k, wide_v, out, lse, mask, scale)
        dq, dk, dv = (_heads_inside(grad[..., : x.shape[3]]) for grad, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv
    return _backward(dout, q, k, v, out, lse, mask, scale)


def _in_single(q: Tensor, k: Tensor) -> bool:
    """Whether half precision is better computed in fp32.

    fp16 always: at 256 and 1,280 tokens, on an AMD EPYC, the kernel's backward takes four to eight times as long in it. bf16
    where there are few rows: in the backward the kernel rounds P and dS, and errors of few terms do not average out.
    """
    return q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and min(q.shape[2], k.shape[2]) < FEW_ROWS)


def _backward_with_lse(dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float):
    """delta = rowsum(dO * O) - dlse: one more column, 1 in dO, -dlse in O and 0 in V, has the kernel subtract it."""
    wide = lse.dtype
    dout, out, v = (F.pad(x.to(wide), (0, 1)) for x in (dout, out, v))
    dout[..., -1], out[..., -1] = 1, -dlse
    dq, dk, dv = backward(dout, None, q.to(wide), k.to(wide), v, out, lse, mask, scale)
    dq, dk, dv = (_heads_inside(x.to(q.dtype)) for x in (dq, dk, dv[..., :-1]))
    return dq, dk, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor]:
    """Of q, k and v that have one number of heads and one width, with scale > 0."""
    if _unmasked(mask) and q.numel() and k.numel():  # the shortest way for the least request
        out, lse = _flash(q, k, v, 0.0, False, scale=scale)
        return _heads_inside(out), lse.contiguous()
    B, H, M, D = q.shape
    N = k.shape[2]
    k, v, calls = _calls(q, k, v, mask)
    if len(calls) == 1 and calls[0].whole(B, M, N):
        (part,) = calls
        out, lse = _forward_block(q, k, v, *_additive(part, part.blocks[0], q, {}), part.causal, scale)
        return _heads_inside(out), lse.contiguous()
    out = q.new_zeros(B, M, H, D).transpose(1, 2)
    lse = q.new_full((B, H, M), -INF, dtype=_lse_dtype(q))
    for part in calls:
        keys, values = (_take(x[part.batch], part.keys) for x in (k, v))
        made: dict = {}
        for block, block_keys, block_values in zip(part.blocks, _columns(keys, part), _columns(values, part), strict=True):
            where = _some(part.queries, block.rows)
            args = _take(q[part.batch], where), block_keys, block_values, *_additive(part, block, q, made)
            block_out, block_lse = _forward_block(*args, part.causal, scale)
            _put(out[part.batch], where, block_out)
            lse[part.batch][:, :, where] = block_lse
    return out, lse


def _backward(dout, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    B, H, M, D = q.shape
    N = k.shape[2]
    k, v, calls = _calls(q, k, v, mask)
    if len(calls) == 1 and calls[0].whole(B, M, N):
        (part,) = calls
        return _backward_block(dout, q, k, v, out, lse, *_additive(part, part.blocks[0], q, {}), part.causal, scale)
    dq, dk, dv = (x.new_zeros(B, x.shape[2], H, D).transpose(1, 2) for x in (q, k, v))
    for part in calls:
        keys, values = (_take(x[part.batch], part.keys) for x in (k, v))
        sums = [torch.zeros_like(x, dtype=_lse_dtype(q)) for x in (keys, values)]
        made: dict = {}
        for block, block_keys, block_values in zip(part.blocks, _columns(keys, part), _columns(values, part), strict=True):
            where = _some(part.queries, block.rows)
            block_dout, block_q, block_out = (_take(x[part.batch], where) for x in (dout, q, out))
            args = block_dout, block_q, block_keys, block_values, block_out, lse[part.batch][:, :, where]
            block_dq, *grads = _backward_block(*args, *_additive(part, block, q, made), part.causal, scale)
            _put(dq[part.batch], where, block_dq)
            for total, grad in zip(sums, grads, strict=True):
                start = 0
                for run in block.runs:
                    length = run.stop - run.start
                    total[:, :, run] += grad[:, :, start : start + length]
                    start += length
        for x, total in zip((dk, dv), sums, strict=True):
            _put(x[part.batch], part.keys, total)
    return dq, dk, dv


def _unmasked(mask: LoweredMask) -> bool:
    return all(field is None for field in mask)


def _calls(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> tuple[Tensor, Tensor, list[Part]]:
    """k and v, with 0 for dead keys where all sequences share calls, and the calls."""
    if not (q.numel() and k.numel()):
        return k, v, []
    if not _pads(q, k, mask):
        return k, v, parts(mask, q, k.shape[2])
    only_ranges = LoweredMask(key_begin=mask.key_begin, key_end=mask.key_end, keys=mask.keys)
    live = only_ranges.visible(q.shape[0], 1, 1, k.shape[2])
    if not (k.sum().isfinite() and v.sum().isfinite()):
        hidden = ~live.mT
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return k, v, parts(mask, q, k.shape[2], live)


def _pads(q: Tensor, k: Tensor, mask: LoweredMask) -> bool:
    """Whether calls that compute the padding too are cheaper than a call for each sequence."""
    if mask.query_end is not None or mask.ids is not None or (mask.key_begin is None and mask.key_end is None):
        return False
    B, H, M, D = q.shape
    N = k.shape[2]
    begin = 0 if mask.key_begin is None else mask.key_begin
    live = torch.as_tensor(N if mask.key_end is None else mask.key_end.clamp(max=N)) - begin
    hidden = B * N - int((live.clamp(min=0) if mask.keys is None else mask.keys).sum())
    return 0 < H * M * D * hidden < B * HIDDEN_WORK[q.dtype]


def _forward_block(q, k, v, additive: Tensor | None, dead: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if additive is None:
        return _flash(q, k, v, 0.0, causal, scale=scale)
    out, lse = _flash(q, k, v, 0.0, False, attn_mask=_rectangle(additive, q, k), scale=scale)
    if dead is not None:  # there the kernel gives lse 0.0, and out from exp(-inf - -inf) in some versions
        lse = lse.masked_fill(dead, -INF)
        out = out.masked_fill(dead[..., None], 0)
    return out, lse


def _backward_block(dout, q, k, v, out, lse, additive: Tensor | None, dead: Tensor | None, causal: bool, scale: float):
    if dead is not None:
        lse = lse.masked_fill(dead, 0)
        q, dout = q.masked_fill(dead[..., None], 0), dout.masked_fill(dead[..., None], 0)
    additive = None if additive is None else _rectangle(additive, q, k)
    return _flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=additive, scale=scale)


def _additive(part: Part, block: Block, q: Tensor, made: dict) -> tuple[Tensor | None, Tensor | None]:
    """What is added to a block's scores, 0 and -inf where a pair is hidden, and which rows see nothing; None for nothing.

    `made`: those of the part's last block, since bounds on j - i alone hide the same pairs in many blocks.
    """
    if block.full:
        return None, None
    if block.words is not None:
        return unpacked(block.words, sum(run.stop - run.start for run in block.runs), q.dtype), block.dead
    shape = part.shape(block)
    if shape not in made:
        visible = part.visible(block)
        made.clear()
        made[shape] = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -INF), dead_rows(visible)
    return made[shape]


def _rectangle(additive: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The kernel wants the last two dimensions in full, without a copy."""
    return additive.expand(-1, -1, q.shape[2], k.shape[2])


def _groups(q: Tensor, k: Tensor) -> list[slice]:
    """The g-th query heads of all groups, which line up with the heads of k and v."""
    G = q.shape[1] // k.shape[1]
    return [slice(g, None, G) for g in range(G)]


def _of_heads(mask: LoweredMask, heads: slice) -> LoweredMask:
    """Bits of each head become others, to which the lists of tiles do not belong."""
    if mask.bits is None or mask.bits.shape[1] == 1:
        return mask
    return mask._replace(bits=mask.bits[:, heads], key_tiles=None, query_tiles=None)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q, scale and sign with the same scores and scale > 0: the kernel multiplies its -inf by the scale."""
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, -scale or 1.0, sign


def _some(where: slice | Tensor, rows: slice) -> slice | Tensor:
    """Those of `where` that `rows` counts."""
    return slice(where.start + rows.start, where.start + rows.stop) if isinstance(where, slice) else where[rows]


def _take(x: Tensor, where: slice | Tensor) -> Tensor:
    """(B, H, L, D) at some of L. A call for each sequence: along the first dimension index_select copies whole rows."""
    if isinstance(where, slice):
        return x[:, :, where]
    B, H, _, D = x.shape
    taken = x.new_empty(B, len(where), H, D)
    for sequence, source in zip(taken, x.transpose(1, 2), strict=True):
        torch.index_select(source, 0, where, out=sequence)
    return taken.transpose(1, 2)


def _put(x: Tensor, where: slice | Tensor, value: Tensor) -> None:
    if isinstance(where, slice):
        x[:, :, where].copy_(value)
        return
    for sequence, source in zip(x.transpose(1, 2), value.transpose(1, 2).to(x.dtype), strict=True):
        sequence.index_copy_(0, where, source)


def _columns(x: Tensor, part: Part) -> Iterator[Tensor]:
    """The keys of each block. Several runs are laid end to end in one buffer, where what the next block begins with stays."""
    B, H, _, D = x.shape
    sizes = [sum(run.stop - run.start for run in block.runs) for block in part.blocks]
    laid = [block.runs for block in part.blocks if len(block.runs) > 1]
    buffer = x.new_empty(B, max(sizes), H, D) if laid else x
    last: tuple[slice, ...] = ()
    for block, size in zip(part.blocks, sizes, strict=True):
        if len(block.runs) == 1:
            yield x[:, :, block.runs[0]]
            continue
        start, same = 0, True
        for n, run in enumerate(block.runs):
            length = run.stop - run.start
            same = same and last[n : n + 1] == (run,)
            if not same:
                buffer[:, start : start + length].copy_(x[:, :, run].transpose(1, 2))
            start += length
        last = block.runs
        yield buffer[:, :size].transpose(1, 2)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_inside(x: Tensor) -> Tensor:
    """(B, H, L, D) in (B, L, H, D) memory; the kernel's output follows q's strides, so this is most often no copy."""
    B, H, L, D = x.shape
    if x.transpose(1, 2).is_contiguous():
        return x
    return x.new_empty(B, L, H, D).transpose(1, 2).copy_(x)
