"""How `accelerate` computes a layer of an encoder, of whatever family, by the public functions.

B, L, C, T: sequences, padded length, hidden size, real tokens. x is (T, C) of a packed batch, else (B, L, C).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import biases, masks
from fastattn.activations import GATED
from fastattn.biases import Bias
from fastattn.integrations.accelerate_parts import BEYOND_PLAIN, Family, Held, Parts
from fastattn.kept import Made, kept, nothing_kept
from fastattn.masks import Mask
from fastattn.ops.attention import attention
from fastattn.ops.dispatch import autocast_dtype
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear
from fastattn.ops.norm import add_layer_norm, add_rms_norm
from fastattn.ops.rotary import rotary
from fastattn.ops.varlen import varlen_attention
from fastattn.packing import Packing


def traced(x: Tensor) -> bool:
    """Whether what happens now will run again without this code, or has no values: nothing may be read on the host or kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" or torch._C._are_functorch_transforms_active():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Batch(NamedTuple):
    """Of one call: how its tokens lie, what beside that hides one from another, and the proof that its layers are to give."""

    packing: Packing | None
    mask: Mask | None
    scratch: dict  # memory that the layers of this call share
    proof: Any = None


class Beside(NamedTuple):
    """What a layer is given beside x."""

    bias: Bias | Tensor | None = None  # of attention; a tensor (1, H, L, L)
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine, (T, R), or (1 or B, L, R)
    memory: Tensor | None = None  # (B, S, M): states of another model, to which cross attention attends; x is (B, L, C) then


NOTHING = Beside()
GATES = {inner: name for name, inner in GATED.items()}
CLAMPED = torch.finfo(torch.float16).max - 1000  # where a layer clamps in float16


def beside(family: Family, parts: Parts, x: Tensor, batch: Batch, named: dict[str, Any]) -> Beside:
    """Of the other arguments, by name, that a layer of transformers is given. x: (B, L, C), or packed."""
    bias: Any = None
    if parts.relative is not None:
        attention: Any = parts.attention
        buckets, reach = family.buckets or (attention.relative_attention_num_buckets, attention.relative_attention_max_distance)
        bias = biases.relative(parts.relative.weight, num_buckets=buckets, max_distance=reach)
    if family.pair_bias:
        bias = _of_pairs(family, parts, named)
        if parts.position_bias is not None:
            own: Any = parts.position_bias
            patches = tuple(side // parts.attention.config.patch_size for side in named["resolution"])  # type: ignore[union-attr]
            made = own(patches, named.get("interpolate_pos_encoding", False), dim_size=x.shape[1])
            bias = made if bias is None else made + bias
    rotary = named.get("position_embeddings") if family.rotary else None
    return Beside(bias, None if rotary is None else _of_tokens(x, batch, *rotary))


def _of_pairs(family: Family, parts: Parts, named: dict[str, Any]) -> Tensor | None:
    """(1 or B, H, L, L) of the biases that a layer is given."""
    read = (flag is None or getattr(parts.attention, flag) for _, flag in family.pair_bias)
    first, *more = (named.get(name) if is_read else None for (name, _), is_read in zip(family.pair_bias, read, strict=True))
    if first is None:
        return None
    bias = sum((x for x in more if x is not None), first)
    return bias * family.scale_of(parts.attention) if family.bias_scaled else bias


def _of_tokens(x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of (1 or B, L, R), or (P, R) of the last P tokens, what is of all tokens of x: (T, R) in a packed batch. Made once a call,
    for all layers that are given the same."""
    known = batch.scratch.setdefault("rotary", [])
    for given, made in known:
        if given is cos:
            return made
    packing = batch.packing
    if packing is not None:
        made = tuple(y[0].index_select(0, packing.positions) if y.shape[0] == 1 else packing.pack(y) for y in (cos, sin))
    elif cos.dim() == 2:  # of images: tokens before the patches are not turned
        before = x.shape[1] - cos.shape[0], cos.shape[1]
        made = torch.cat((cos.new_ones(before), cos)), torch.cat((sin.new_zeros(before), sin))
    else:
        made = cos, sin
    known.append((cos, made))
    return made


def plain(family: Family, parts: Parts) -> bool:
    """Whether a layer is what `accelerate_plans` and `accelerate_training` compute, and nothing beyond it."""
    return family.plain and all(getattr(parts, name) is None for name in BEYOND_PLAIN) and type(parts.first_norm) is nn.LayerNorm


def compute(family: Family, parts: Parts, x: Tensor, batch: Batch, beside: Beside = NOTHING) -> Tensor:
    """A layer's output, of x's shape."""
    first, second = parts.first_norm, parts.second_norm
    training = parts.attention.training and not torch.is_grad_enabled() and not traced(x)
    with nothing_kept() if training else contextlib.nullcontext():
        normal = _norm(family, first, x) if family.pre_norm else x
        y = linear(attended(family, parts, normal, batch, beside), parts.out.weight, parts.out.bias)
        y, dropout = _branch(parts, y, parts.first_scale, rate(parts.attention_output_dropout))
        if family.pre_norm:
            normal, x = _norm_of_sum(family, second, y, x, dropout, return_sum=True)
        else:
            normal = x = _norm_of_sum(family, first, y, x, dropout)
            if beside.memory is not None:
                normal = x = _crossed(family, parts, x, beside.memory)
        y, dropout = _branch(parts, _ffn(family, parts, normal), parts.second_scale, rate(parts.ffn_output_dropout))
        if family.pre_norm:
            x = x + (F.dropout(y, dropout) if dropout else y)  # no norm follows in the layer, so that this dropout is PyTorch's
        else:
            x = _norm_of_sum(family, second, y, x, dropout)
        return x if family.clamps is None or x.dtype != torch.float16 else _clamped(family, x)


def _clamped(family: Family, x: Tensor) -> Tensor:
    if family.clamps == "always":
        return x.clamp(-CLAMPED, CLAMPED)
    bound = torch.where(x.isfinite().all(), torch.inf, CLAMPED)
    return x.clamp(-bound, bound)


def rate(dropout: nn.Module | Held | None) -> float:
    """Of an nn.Dropout, or of nothing or an nn.Identity, which many put in its place, in its mode of now."""
    return getattr(dropout, "p", 0.0) if dropout is not None and dropout.training else 0.0


def _branch(parts: Parts, y: Tensor, scale: Held | None, dropout: float) -> tuple[Tensor, float]:
    """What is added to the residual stream, (B, L, C), of what attention or the FFN gives, and the dropout that is still to come:
    a factor for each feature is the same before and after it."""
    if scale is not None and isinstance(scale.value, Tensor):
        y = y * scale.value
    if parts.drop_path is None or not parts.drop_path.training or type(parts.drop_path) is nn.Identity:
        return y, dropout
    return parts.drop_path(F.dropout(y, dropout) if dropout else y), 0.0  # by transformers' own code and draw


def _ffn(family: Family, parts: Parts, x: Tensor) -> Tensor:
    """Dropout is of what the last product is given; by PyTorch where a gate is a product of its own."""
    up, down, gate, activation = parts.up, parts.down, parts.gate, family.activation_of(parts)
    assert activation is not None
    dropout = rate(parts.hidden_dropout)
    if gate is None:
        activation = GATES[activation] if family.gated else activation
        return ffn(x, up.weight, up.bias, down.weight, down.bias, activation=activation, dropout=dropout)
    hidden = linear(x, up.weight, up.bias, activation=activation) * linear(x, gate.weight, gate.bias)
    return linear(F.dropout(hidden, dropout) if dropout else hidden, down.weight, down.bias)


def _norm(family: Family, norm: Any, x: Tensor) -> Any:
    if family.rms is not None:
        return add_rms_norm(x, None, norm.weight, eps=norm.variance_epsilon)
    return x if isinstance(norm, nn.Identity) else add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)


def _norm_of_sum(family: Family, norm: Any, y: Tensor, x: Tensor, dropout: float, return_sum: bool = False) -> Any:
    """The norm of dropout(y) + x in the dtype that PyTorch gives it: the wider one, and under autocast on a GPU fp32."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    if x.is_cuda and not return_sum and autocast_dtype(x) is not None:
        dtype = torch.float32
    options: Any = {"dropout": dropout, "return_sum": return_sum}
    y = y.to(dtype)
    if family.rms is not None:
        return add_rms_norm(y, x, norm.weight, eps=norm.variance_epsilon, **options)
    return add_layer_norm(y, x, norm.weight, norm.bias, eps=norm.eps, **options)


def attended(family: Family, parts: Parts, x: Tensor, batch: Batch, beside: Beside = NOTHING) -> Tensor:
    """What attention gives each token before the last projection: (..., H D)."""
    head_size, scale = getattr(parts.attention, family.head_size), family.scale_of(parts.attention)
    dropout, mask, bias = family.rate_of_attention(parts.attention), _mask(family, parts, batch), beside.bias
    projections: Any = parts.query, parts.key, parts.value
    one = joined(*projections) if parts.joined is None else (parts.joined.weight, parts.joined.bias)
    if one is not None:
        q, k, v = linear(x, *one).unflatten(-1, (3, -1, head_size)).unbind(-3)
    else:
        q, k, v = (linear(x, part.weight, part.bias).unflatten(-1, (-1, head_size)) for part in projections)
    if batch.packing is not None:
        q, k = _rotated(q, k, beside)
        return varlen_attention(q, k, v, batch.packing, mask, bias=bias, scale=scale, dropout=dropout).flatten(-2)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    q, k = _rotated(q, k, beside)
    return attention(q, k, v, mask, bias=bias, scale=scale, dropout=dropout).transpose(1, 2).flatten(-2)


def _crossed(family: Family, parts: Parts, x: Tensor, memory: Tensor) -> Tensor:
    """LN(x + cross attention(x, memory)): queries are of x, (B, L, C), keys and values of memory, (B, S, M).

    Of all of it: BLIP's layers hand the mask of these states on under a name that their cross attention does not read."""
    numbers, out, norm = parts.cross_attention, parts.cross_out, parts.cross_norm
    assert numbers is not None and out is not None
    projections: Any = (parts.cross_query, x), (parts.cross_key, memory), (parts.cross_value, memory)
    head_size = getattr(numbers, family.head_size)
    q, k, v = (linear(y, part.weight, part.bias).unflatten(-1, (-1, head_size)).transpose(1, 2) for part, y in projections)
    y = attention(q, k, v, scale=family.scale_of(numbers), dropout=family.rate_of_attention(numbers))
    y = linear(y.transpose(1, 2).flatten(-2), out.weight, out.bias)
    return _norm_of_sum(family, norm, y, x, rate(parts.cross_output_dropout))


def _rotated(q: Tensor, k: Tensor, beside: Beside) -> tuple[Tensor, Tensor]:
    """By the angles of their tokens: of transformers' tables the second half repeats the first."""
    if beside.rotary is None:
        return q, k
    cos, sin = (table[..., : table.shape[-1] // 2] for table in beside.rotary)
    return rotary(q, k, cos, sin)


def _mask(family: Family, parts: Parts, batch: Batch) -> Mask | None:
    """The batch's, and a layer's window, built once a call."""
    reach = None if family.window is None else getattr(parts.attention, family.window)
    if reach is None:
        return batch.mask
    mask = batch.scratch.get(("window", reach))
    if mask is None:
        window = masks.window(reach - 1, reach - 1)
        mask = batch.scratch["window", reach] = window if batch.mask is None else window & batch.mask
    return mask


def heads_of(x: Tensor, heads: int, *projections: nn.Linear) -> tuple[Tensor, ...]:
    """q, k and v, (B, H, L, D) each, of x (B, L, C), by one product where `joined` gives one."""
    one = joined(*projections)
    if one is not None:
        return linear(x, *one).unflatten(-1, (3, heads, -1)).transpose(1, 3).unbind(2)
    return tuple(linear(x, part.weight, part.bias).unflatten(-1, (heads, -1)).transpose(1, 2) for part in projections)


def joined(*projections: nn.Linear) -> tuple[Tensor, Tensor | None] | None:
    """Weight (3 H D, C) and bias of query, key and value as one, where a single product is worth it.

    On a CPU a copy that is kept; on a GPU, where asking whether a copy is still right would wait, one made in each call of
    inference, which is expected to cost less than two more products.
    """
    weights: list[Tensor] = [part.weight for part in projections]
    biases: list[Tensor | None] = [part.bias for part in projections]

    def join() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # packed copies of the copy are kept of what has a version
            return Made(torch.cat(weights), requires_grad=False)

    if weights[0].shape != weights[1].shape or torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight: Tensor | None = None
    if weights[0].is_cuda:
        weight = torch.cat(weights)
    elif not traced(weights[0]):
        weight = kept(weights, "joined", join)
    if weight is None:
        return None
    if all(bias is None for bias in biases):
        return weight, None
    there = (w.new_zeros(w.shape[0]) if bias is None else bias for w, bias in zip(weights, biases, strict=True))
    return weight, torch.cat([*there])  # in some families keys have none
