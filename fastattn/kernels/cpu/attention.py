"""The cpu backend: PyTorch's flash-attention kernel for CPUs, wherever it is right.

What that kernel gets wrong or refuses is handled here: an empty M or N kills the process, a row with no visible key has
lse 0.0, bool masks are refused, NaN in a padded key leaks, lse is inexact in half precision, a causal mask with scale <= 0
gives NaN or Inf, q, k and v must have one width and one number of heads, and no gradient of the log-sum-exp is taken.
Padding alone is served by few calls, see `attention_padded`; any other mask by a call for each block of queries, on the keys that
it sees: `attention_parts` says which. Dropout is not for that kernel, nor a bias but in inference, where all of it is finite:
`attention_extras`. No tensor has an element for each query and key, unless the bias has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.kernels.cpu import attention_extras, attention_packed, attention_padded
from fastattn.kernels.cpu.attention_parts import HIDDEN_WORK, Block, Part, dead_rows, parts, unpacked
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask

INF = float("inf")
HALF = (torch.float16, torch.bfloat16)
FEW_ROWS, FEW_COLUMNS = 32, 8  # of q or k
LARGEST = 1e30  # of a bias that the kernel adds: no score with it comes near LEAST_SCORE
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unsupported(problem) -> list[str]:
    return [] if problem.device == "cpu" else [f"tensors are on {problem.device}"]


def notes(problem) -> list[str]:
    if problem.bias or problem.relative or problem.alibi or problem.dropout:
        found = ["computed by PyTorch's products and exp, block by block of scores, on real tokens alone"]
        if problem.bias and not problem.dropout:
            found.append("in inference, a finite bias in fp32, with padding at most, by PyTorch's flash-attention kernel")
        return found
    tokens = "on real tokens alone where that pays" if not problem.packed else "in calls for one sequence or some of one length"
    found = [f"computed by PyTorch's flash-attention kernel for CPUs, {tokens}"]
    if problem.Dv != problem.D:
        wide, narrow = ("v", "q and k") if problem.Dv > problem.D else ("q and k", "v")
        found.append(f"{narrow} are copied to the width of {wide}".replace("v are", "v is"))
    if problem.Hkv != problem.H:
        found.append(f"{problem.H // problem.Hkv} calls, one for each query head that shares a head of k and v")
    return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, exact_lse: bool, extras: Extras = NO_EXTRAS
) -> tuple[Tensor, Tensor]:
    if extras.biased or extras.kept is not None:
        if not exact_lse and _added_by_the_kernel(q, k, v, mask, scale, extras):
            return _forward_with_bias(q, k, v, mask, scale, extras.bias)
        return attention_extras.forward(q, k, v, mask, scale, extras)
    if mask.query_starts is not None:
        return attention_packed.forward(forward, q, k, v, mask, scale, exact_lse)
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


def backward(
    dout, dlse, q, k, v, out, lse, mask: LoweredMask, scale: float, extras: Extras = NO_EXTRAS, bias_grad: bool = False
) -> tuple[Tensor, ...]:
    if extras.biased or extras.kept is not None:
        return attention_extras.backward(dout, dlse, q, k, v, lse, mask, scale, extras, bias_grad)
    if mask.query_starts is not None:
        return attention_packed.backward(backward, dout, dlse, q, k, v, out, lse, mask, scale)
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


def _added_by_the_kernel(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, extras: Extras) -> bool:
    """Whether a bias alone, of which every number is finite, goes to PyTorch's kernel as what it adds to scores, beside a mask
    that hides keys of whole sequences if that makes it no larger. Of inference alone: it takes half of the time that
    `attention_extras` does, but gradients that are made there of its lse are up to three times as far off, in short rows."""
    bias, keys = extras.bias, {"keys", "key_begin", "key_end"}
    if bias is None or extras.kept is not None or q.dtype in HALF or scale <= 0 or not (q.numel() and k.numel()):
        return False
    if q.shape[1] != k.shape[1] or q.shape[3] != v.shape[3]:
        return False
    if any(field is not None for name, field in zip(mask._fields, mask, strict=True) if name not in keys):
        return False
    if not _unmasked(mask) and (bias.shape[0], bias.shape[3]) != (q.shape[0], k.shape[2]):
        return False
    return -LARGEST < float(bias.amin()) <= float(bias.amax()) < LARGEST


def _forward_with_bias(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, bias: Tensor) -> tuple[Tensor, Tensor]:
    additive, dead = bias.to(q.dtype), None
    if not _unmasked(mask):
        visible = mask.visible(q.shape[0], 1, 1, k.shape[2])
        additive = torch.where(visible, additive, -INF)
        k, v = (x.masked_fill(~visible.mT, 0) for x in (k, v))  # they may hold NaN
        dead = dead_rows(visible)
    out, lse = _forward_block(q, k, v, additive, dead, False, scale)
    return _heads_inside(out), lse.contiguous()


def _in_single(q: Tensor, k: Tensor) -> bool:
    """Whether half precision is better computed in fp32.

    fp16 always: at 256 and 1,280 tokens, on an AMD EPYC, the kernel's backward takes four to eight times as long in it. bf16
    where there are few rows or columns: in the backward the kernel rounds P and dS, and few errors do not average out.
    """
    few = min(q.shape[2], k.shape[2]) < FEW_ROWS or q.shape[3] < FEW_COLUMNS
    return q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and few)


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
    if attention_padded.serves(mask) and q.numel() and k.numel():
        out, lse = attention_padded.forward(q, k, v, mask, scale)
        return _heads_inside(out), lse
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
        results = out[part.batch], lse[part.batch, :, :, None]
        taken = [_take(x, part.queries) for x in (q[part.batch], *results)]
        keys, values = (_take(x[part.batch], part.keys) for x in (k, v))
        made: dict = {}
        for block in part.blocks:
            additive, dead = _additive(part, block, q, made)
            views = [_queries(x, block) for x in taken] + [_keys(x, block) for x in (keys, values)]
            for block_q, block_out, block_lse, block_k, block_v in zip(*views, strict=True):
                found = _forward_block(block_q, block_k, block_v, additive, dead, part.causal, scale)
                _merge(block_out, block_lse[..., 0], *found) if part.merged else _copy(block_out, block_lse[..., 0], *found)
        for x, value in zip(results, taken[1:], strict=True):
            _put(x, part.queries, value)
    return out, lse


def _backward(dout, q, k, v, out, lse, mask: LoweredMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if attention_padded.serves(mask) and q.numel() and k.numel():
        return attention_padded.backward(dout, q, k, v, out, lse, mask, scale)
    B, H, M, D = q.shape
    N = k.shape[2]
    k, v, calls = _calls(q, k, v, mask)
    if len(calls) == 1 and calls[0].whole(B, M, N):
        (part,) = calls
        return _backward_block(dout, q, k, v, out, lse, *_additive(part, part.blocks[0], q, {}), part.causal, scale)
    sums = [x.new_zeros(B, x.shape[2], H, D, dtype=_lse_dtype(q)).transpose(1, 2) for x in (q, k, v)]
    for part in calls:
        taken = [_take(x[part.batch], part.queries) for x in (dout, q, out, lse[..., None], sums[0])]
        keys, values, *key_sums = (_take(x[part.batch], part.keys) for x in (k, v, *sums[1:]))
        made: dict = {}
        for block in part.blocks:
            additive, dead = _additive(part, block, q, made)
            views = [_queries(x, block) for x in taken] + [_keys(x, block) for x in (keys, values)]
            times = range(len(views[0]))
            for time, block_dout, block_q, block_out, block_lse, block_dq, block_k, block_v in zip(times, *views, strict=True):
                args = block_dout, block_q, block_k, block_v, block_out, block_lse[..., 0], additive, dead, part.causal, scale
                more, *key_grads = _backward_block(*args)
                block_dq += more
                for total, grad in zip(key_sums, key_grads, strict=True):
                    _add_keys(total, block, time, grad)
        places = part.queries, part.keys, part.keys
        for x, where, total in zip(sums, places, (taken[-1], *key_sums), strict=True):
            _put(x[part.batch], where, total)
    dq, dk, dv = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
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
        return unpacked(block.words, block.keys, q.dtype), block.dead
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


def _take(x: Tensor, where: slice | Tensor) -> Tensor:
    """(B, H, L, D) at some of L: a view, or gathered. A call for each sequence: index_select then copies whole rows."""
    if isinstance(where, slice):
        return x if where == slice(0, x.shape[2]) else x[:, :, where]
    B, H, _, D = x.shape
    taken = x.new_empty(B, len(where), H, D)
    for sequence, source in zip(taken, x.transpose(1, 2), strict=True):
        torch.index_select(source, 0, where, out=sequence)
    return taken.transpose(1, 2)


def _put(x: Tensor, where: slice | Tensor, taken: Tensor) -> None:
    """What `_take` gathered back to its place; a view is there already."""
    if isinstance(where, Tensor):
        for sequence, source in zip(x.transpose(1, 2), taken.transpose(1, 2), strict=True):
            sequence.index_copy_(0, where, source)


def _queries(x: Tensor, block: Block) -> tuple[Tensor, ...]:
    return _times(x, block.rows, block.count, block.row_shift)


def _keys(x: Tensor, block: Block) -> tuple[Tensor, ...]:
    if len(block.runs) == 1:
        return _times(x, block.runs[0], block.count, block.key_shift)
    return (torch.cat([x[:, :, run.start : run.stop].transpose(1, 2) for run in block.runs], 1).transpose(1, 2),)


def _times(x: Tensor, places: range, count: int, shift: int) -> tuple[Tensor, ...]:
    """Views of (B, H, L, D) at `places`, and count - 1 times `shift` further on.

    (B, H, places, D) for each time or (count, H, places, D) for each sequence, whichever are fewer calls.
    """
    if count == 1:
        return (x if places == range(x.shape[2]) else x[:, :, places.start : places.stop : places.step],)
    B, H, _, D = x.shape
    b, h, token, d = x.stride()
    strides = b, shift * token, h, places.step * token, d
    views = x.as_strided((B, count, H, len(places), D), strides, x.storage_offset() + places.start * token)
    return views.unbind(1 if count <= B else 0)


def _add_keys(total: Tensor, block: Block, time: int, grad: Tensor) -> None:
    """The gradient of what `_keys` gives as number `time`."""
    if len(block.runs) > 1:
        for run, part in zip(block.runs, grad.split([len(run) for run in block.runs], 2), strict=True):
            total[:, :, run.start : run.stop] += part
        return
    view = _keys(total, block)[time]
    if block.keys_apart:
        view += grad
    else:
        for one, part in zip(view.split(1), grad.split(1), strict=True):
            one += part


def _copy(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    out.copy_(block_out)
    lse.copy_(block_lse)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """The result over the keys of both, in place; the first one's lse is finite."""
    weight = (block_lse - lse).sigmoid_()[..., None]
    if out.dtype == weight.dtype:
        out.lerp_(block_out, weight)
    else:
        out.copy_(out.to(weight.dtype).lerp_(block_out.to(weight.dtype), weight))
    torch.logaddexp(lse, block_lse, out=lse)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads_inside(x: Tensor) -> Tensor:
    """(B, H, L, D) in (B, L, H, D) memory; the kernel's output follows q's strides, so this is most often no copy."""
    B, H, L, D = x.shape
    if x.transpose(1, 2).is_contiguous():
        return x
    return x.new_empty(B, L, H, D).transpose(1, 2).copy_(x)
