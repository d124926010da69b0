"""A layer of an accelerated encoder on a GPU: PyTorch's products, the launches of our kernels, and nothing in between.

Inference works in memory that the layers of a call share (`Scratch`); each layer allocates its result alone, which whoever asked
for hidden states may keep. Training is one autograd Function a layer (`accelerate_training`). What is served neither way, and
what something of PyTorch's watches, is left to `accelerate_layers.compute`, which calls the public functions.

x is (T, C) of a packed batch, else (B, L, C); as a matrix it is (rows, C). W = H D is the width of the heads together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import planned
from fastattn.integrations.accelerate_layers import Batch, rate
from fastattn.integrations.accelerate_parts import LINEARS, NORMS, Family, Parts
from fastattn.lowering import Prepared, batched, three
from fastattn.masks import Mask
from fastattn.ops import attention, attention_plans, dispatch, ffn, linear, norm
from fastattn.ops.varlen import prepared_of
from fastattn.packing import Packing

ORDER = (*LINEARS, *NORMS)  # query, key, value, out, up, down, first and second norm: of each the weight, then the bias
UNSERVED = object()
SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


class Numbers(NamedTuple):
    """Read from a layer's modules in each call."""

    pre_norm: bool
    head_size: int
    scale: float
    first_eps: float
    second_eps: float
    activation: str
    attention_dropout: float  # 0 in evaluation
    first_dropout: float  # of what attention adds
    second_dropout: float  # of what the FFN adds


class Weights:
    """A layer's parameters, and what plans depend on of them."""

    _layouts: dict[tuple, object] = {}

    def __init__(self, parts: Parts) -> None:
        owners = [getattr(parts, name)._parameters for name in ORDER]
        self._owners, self._names = [owner for owner in owners for _ in range(2)], ["weight", "bias"] * len(ORDER)
        self.tensors: list[Any] = []
        self._there: list[Tensor] = []
        self._places: list[Any] = []
        self._key: object | None = None

    def key(self) -> object | None:
        """One object for each layout; None where these are not plain tensors of one dtype and device, each contiguous.

        In each call it is looked at whether they are the same parameters, and lie where and as they did.
        """
        tensors = [*map(dict.get, self._owners, self._names)]
        if not self.tensors or not all(map(operator.is_, tensors, self.tensors)):
            self.tensors, self._there, self._places = tensors, [x for x in tensors if x is not None], []
        places = [*map(Tensor.data_ptr, self._there), *map(SHAPE, self._there), *map(Tensor.stride, self._there)]
        if places != self._places:
            self._places, self._key = places, self._described()
        return self._key

    def _described(self) -> object | None:
        first, biases = self._there[0], self.tensors[1:6:2]
        for x in self._there:
            if type(x) not in planned.PLAIN or x.dtype != first.dtype or x.device != first.device:
                return None
            if not x.is_contiguous() or x.data_ptr() % 16:
                return None
        if len({x is None for x in biases}) > 1:
            return None
        shapes = tuple(None if x is None else x.shape for x in self.tensors)
        return self._layouts.setdefault((first.dtype, first.device, shapes), object())


def numbers_of(family: Family, parts: Parts) -> Numbers:
    """Of a layer that is `plain`."""
    name = family.activation_of(parts)
    assert name is not None
    head_size, scale = getattr(parts.attention, family.head_size), family.scale_of(parts.attention)
    dropouts = family.rate_of_attention(parts.attention), rate(parts.attention_output_dropout), rate(parts.ffn_output_dropout)
    return Numbers(family.pre_norm, head_size, scale, parts.first_norm.eps, parts.second_norm.eps, name, *dropouts)


def served(x: Tensor) -> bool:
    """Whether a layer may be computed here, as far as its input and PyTorch's state tell."""
    if not (x.is_cuda or planned.pretending) or type(x) not in planned.PLAIN or planned.watched():
        return False
    return x.is_contiguous() and x.numel() > 0


# Inference


class Scratch:
    """Memory of one call, which its layers use one after the other, and the call's mask as kernels take it."""

    def __init__(self, x: Tensor, numbers: Numbers, weights: Weights, packing: Packing | None, mask: Mask | None) -> None:
        query, bias = weights.tensors[:2]
        (W, C), rows = query.shape, x.shape[:-1].numel()
        heads = W // numbers.head_size
        self.mask = prepared_mask(x, heads, packing, mask)
        self.qkv, self.weight = x.new_empty((rows, 3 * W)), x.new_empty((3 * W, C))
        self.bias = None if bias is None else x.new_empty(3 * W)
        self.projected, self.normal = x.new_empty((rows, C)), x.new_empty((rows, C))
        whole = packing is None or packing.full
        self.attended = x.new_empty((rows, W)) if whole else x.new_zeros((rows, W))  # no kernel writes rows of no sequence
        if packing is None:
            (B, L, _), D = x.shape, numbers.head_size
            self.q, self.k, self.v = three(self.qkv, (B, heads, L, D))
            self.heads = self.attended.view(B, L, heads, D).transpose(1, 2)
        else:
            self.q, self.k, self.v = three(self.qkv, (rows, heads, numbers.head_size))
            self.heads = self.attended.view(rows, heads, numbers.head_size)


def prepared_mask(x: Tensor, heads: int, packing: Packing | None, mask: Mask | None) -> Prepared:
    if packing is not None:
        return prepared_of(packing, mask, heads)
    if mask is None:
        return attention.NO_MASK
    return Prepared(attention.lower_mask(mask, x.shape[0], heads, x.shape[1], x.shape[1], x.device))


def inferred(family: Family, parts: Parts, weights: Weights, x: Tensor, batch: Batch) -> Tensor | None:
    """A layer's output, of x's shape, without gradients; None where it is not served here."""
    layout, numbers = weights.key(), numbers_of(family, parts)
    if layout is None or x.dtype != weights.tensors[0].dtype or any(numbers[-3:]):
        return None
    shape = x.shape if batch.packing is None else x.shape[1:]
    scratch = batch.scratch.get((layout, numbers, x.shape))
    if scratch is None:
        scratch = batch.scratch[layout, numbers, x.shape] = Scratch(x, numbers, weights, batch.packing, batch.mask)
    key = "layer", layout, numbers, shape, x.device, x.data_ptr() % 16, scratch.mask.key, planned.fp32_precision(x.dtype)
    plan: Any = planned.PLANS.get(key) or planned.keep(key, _inference(numbers, weights, x, scratch))
    return None if plan is UNSERVED else plan(x, weights.tensors, scratch)


def _inference(numbers: Numbers, weights: Weights, x: Tensor, s: Scratch) -> Any:
    """(x, weights, scratch) -> y by the Triton backend's plans, or UNSERVED."""
    rows, up, (w1, b1), (w2, b2) = x.view(-1, x.shape[-1]), weights.tensors[8:10], weights.tensors[12:14], weights.tensors[14:]
    seen = attention_plans.problem_of(batched(s.q), batched(s.k), batched(s.v), s.mask.fields)
    wide = linear.LinearProblem(x.device.type, x.dtype, rows.shape[0], x.shape[-1], up[0].shape[0], numbers.activation)
    try:
        attend, project, normalise = (
            dispatch.choose(op, order, "triton", problem)
            for op, order, problem in (
                ("attention", attention.BACKENDS, seen),
                ("ffn", ffn.BACKENDS, wide),
                ("norm", norm.BACKENDS, norm.NormProblem(x.device.type, x.dtype, x.shape[-1])),
            )
        )
    except NotImplementedError:
        return UNSERVED
    run = _pre_norm if numbers.pre_norm else _post_norm
    first_input = (rows, None) if numbers.pre_norm else (s.projected, rows)
    second_input = (s.projected, rows) if numbers.pre_norm else (s.projected, s.normal)
    return run(
        attend.forward_plan(s.q, s.k, s.v, s.mask, numbers.scale, False, False),
        project.forward_plan(s.normal, *up, None, numbers.activation, False),
        normalise.forward_plan(*first_input, w1, b1, numbers.first_eps, False, False, False),
        normalise.forward_plan(*second_input, w2, b2, numbers.second_eps, False, numbers.pre_norm, False),
    )


def _project(s: Scratch, x: Tensor, attend: Callable, weights: list[Tensor]) -> None:
    """x (rows, C) -> s.projected: what attention adds. Query, key and value are one product; where gradients of a weight may be
    wanted, or its values change without a trace, a joined copy could not be kept."""
    query, query_bias, key, key_bias, value, value_bias, out, out_bias, *_ = weights
    torch.cat((query, key, value), out=s.weight)
    if s.bias is not None:
        torch.cat((query_bias, key_bias, value_bias), out=s.bias)
    F.linear(x, s.weight, s.bias, out=s.qkv)  # type: ignore[call-arg]
    attend(s.q, s.k, s.v, s.mask, s.heads)
    F.linear(s.attended, out, out_bias, out=s.projected)  # type: ignore[call-arg]


def _post_norm(attend: Callable, up: Callable, first: Callable, second: Callable) -> Callable:
    def run(x: Tensor, weights: list[Tensor], s: Scratch) -> Tensor:
        rows = x.view(s.normal.shape)
        _project(s, rows, attend, weights)
        first(s.projected, rows, weights[12], weights[13], s.normal)
        hidden, _ = up(s.normal, weights[8], weights[9], None)
        F.linear(hidden, weights[10], weights[11], out=s.projected)  # type: ignore[call-arg]
        y = torch.empty_like(x)
        second(s.projected, s.normal, weights[14], weights[15], y)
        return y

    return run


def _pre_norm(attend: Callable, up: Callable, first: Callable, second: Callable) -> Callable:
    def run(x: Tensor, weights: list[Tensor], s: Scratch) -> Tensor:
        rows = x.view(s.normal.shape)
        first(rows, None, weights[12], weights[13], s.normal)
        _project(s, s.normal, attend, weights)
        _, total, _, _ = second(s.projected, rows, weights[14], weights[15], s.normal)
        hidden, _ = up(s.normal, weights[8], weights[9], None)
        F.linear(hidden, weights[10], weights[11], out=s.projected)  # type: ignore[call-arg]
        return total.add_(s.projected).view(x.shape)

    return run
