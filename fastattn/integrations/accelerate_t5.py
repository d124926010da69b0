"""T5's encoder for `accelerate`: RMSNorms, and a bias of each distance that the first layer learns and all layers share.

A layer takes and returns that bias beside x, through transformers' own loop; here it is a `biases.relative`, never (H, L, L).
There is no module around the layers alone, so that the first of them packs, and the model's output is unpacked.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastattn import biases
from fastattn.biases import Bias
from fastattn.integrations.accelerate_layers import Batch, Family, Parts, activation_name, attended, rate
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear
from fastattn.ops.norm import add_rms_norm


def bias_of(parts: Parts, given: Bias | Tensor | None) -> Bias | Tensor:
    """The bias that a layer adds: its own, or that of the first layer, which it was given."""
    if parts.relative is None:
        assert given is not None
        return given
    made: Any = parts.attention
    buckets, reach = made.relative_attention_num_buckets, made.relative_attention_max_distance
    return biases.relative(parts.relative.weight, num_buckets=buckets, max_distance=reach)


def compute(family: Family, parts: Parts, x: Tensor, batch: Batch, bias: Bias | Tensor) -> Tensor:
    """A layer's output, of x's shape: y = x + dropout(attention(RMSNorm(x))), y + dropout(ffn(RMSNorm(y)))."""
    first: Any = parts.first_norm
    second: Any = parts.second_norm
    normal: Any = add_rms_norm(x, None, first.weight, eps=first.variance_epsilon)
    y = linear(attended(family, parts, normal, batch, bias), parts.out.weight, None)
    dropout = rate(parts.attention_output_dropout)
    normal, x = add_rms_norm(y, x, second.weight, eps=second.variance_epsilon, dropout=dropout, return_sum=True)
    y = _ffn(parts, normal)
    dropout = rate(parts.ffn_output_dropout)
    return x + (F.dropout(y, dropout) if dropout else y)


def _ffn(parts: Parts, x: Tensor) -> Tensor:
    """Dropout is of what the last product is given; of a gated one by PyTorch."""
    activation, dropout, gate = activation_name(parts.activation), rate(parts.hidden_dropout), parts.gate
    assert activation is not None
    if gate is None:
        return ffn(x, parts.up.weight, None, parts.down.weight, None, activation=activation, dropout=dropout)
    hidden = linear(x, parts.up.weight, None, activation=activation) * linear(x, gate.weight, None)
    return linear(F.dropout(hidden, dropout) if dropout else hidden, parts.down.weight, None)


def own_bias(parts: Parts, bias: Bias | Tensor, length: int) -> Tensor | None:
    """What the layer's own code takes for it: the first one makes its own, others are given it for each pair."""
    if parts.relative is not None:
        return None
    return bias.dense(length, length) if isinstance(bias, Bias) else bias
