"""The encoders that `accelerate` knows: where their layers are, what a layer is made of, and how it is computed.

B, L, C, T: sequences, padded length, hidden size, real tokens. x is (T, C) of a packed batch, else (B, L, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.masks import Mask
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn, linear
from fastattn.ops.norm import add_layer_norm
from fastattn.ops.varlen import varlen_attention
from fastattn.packing import Packing

# the classes of activation modules, and ours for an equal
ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}


class Batch(NamedTuple):
    """How the tokens of a call lie, and what beside that hides one from another."""

    packing: Packing | None
    mask: Mask | None


@dataclass(eq=False)
class Parts:
    """One layer. Post-norm: y = LN(x + attention(x)), LN(y + ffn(y)); pre-norm: y = x + attention(LN(x)), y + ffn(LN(y))."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    first_norm: nn.LayerNorm
    second_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    activation: nn.Module
    heads: int
    pre_norm: bool
    attention_dropout: float
    attention_output_dropout: float  # of what attention adds
    ffn_output_dropout: float
    _joined: tuple[Any, Tensor, Tensor | None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raise NotImplementedError where a part is not what its name says: wrapped, quantized, hooked."""
        for name, kind in (("query", nn.Linear), ("key", nn.Linear), ("value", nn.Linear), ("out", nn.Linear), ("up", nn.Linear),
                           ("down", nn.Linear), ("first_norm", nn.LayerNorm), ("second_norm", nn.LayerNorm)):  # fmt: skip
            part = getattr(self, name)
            if type(part) is not kind:
                raise NotImplementedError(f"{name} is a {type(part).__name__}, not a plain {kind.__name__}")
            if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
                raise NotImplementedError(f"{name} has hooks, which would not run")
        if type(self.activation).__name__ not in ACTIVATION_CLASSES:
            raise NotImplementedError(f"activation {type(self.activation).__name__} is not served")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_joined": None}  # a copy of weights is not saved

    def forget(self) -> None:
        self._joined = None

    def joined(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (3C, C) and bias of query, key and value as one, kept while theirs stay as they are; inference alone."""
        projections = self.query, self.key, self.value
        biases = [part.bias for part in projections]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (None in biases and biases != [None] * 3):
            return None
        tensors = [x for part in projections for x in (part.weight, part.bias) if x is not None]
        if any(x.is_inference() for x in tensors):  # it has no version to tell whether it was changed
            return None
        state = [(x.data_ptr(), x._version, x.dtype, x.device) for x in tensors]
        if self._joined is None or self._joined[0] != state:
            with torch.inference_mode(False):  # for packed copies, which need a version too
                weight = torch.cat([part.weight.detach() for part in projections])
                bias = None if None in biases else torch.cat([x.detach() for x in biases])
            self._joined = state, weight, bias
        return self._joined[1:]


def compute(parts: Parts, x: Tensor, batch: Batch, training: bool) -> Tensor:
    def dropped(y: Tensor, p: float) -> Tensor:
        return F.dropout(y, p, training) if p > 0 else y

    first, second, up, down = parts.first_norm, parts.second_norm, parts.up, parts.down
    activation = ACTIVATION_CLASSES[type(parts.activation).__name__]
    normal = _norm(first, x, None) if parts.pre_norm else x
    attended = linear(_attended(parts, normal, batch), parts.out.weight, parts.out.bias)
    attended = dropped(attended, parts.attention_output_dropout)
    if parts.pre_norm:
        normal, x = add_layer_norm(attended, x, second.weight, second.bias, eps=second.eps, return_sum=True)
    else:
        normal = x = _norm(first, attended, x)
    y = ffn(normal, up.weight, up.bias, down.weight, down.bias, activation=activation)
    y = dropped(y, parts.ffn_output_dropout)
    return x + y if parts.pre_norm else _norm(second, y, x)


def _norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None) -> Any:
    return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps)


def _attended(parts: Parts, x: Tensor, batch: Batch) -> Tensor:
    """What attention gives each token before the last projection: x's shape, (..., H D)."""
    joined = parts.joined()
    if joined is not None:
        q, k, v = linear(x, *joined).unflatten(-1, (3, parts.heads, -1)).unbind(-3)
    else:
        projections = parts.query, parts.key, parts.value
        q, k, v = (linear(x, part.weight, part.bias).unflatten(-1, (parts.heads, -1)) for part in projections)
    if batch.packing is not None:
        return varlen_attention(q, k, v, batch.packing, batch.mask).flatten(-2)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return attention(q, k, v, batch.mask).transpose(1, 2).flatten(-2)


# Families


class Family(NamedTuple):
    layers: str  # the list of them, as an attribute path
    describe: Callable[[Any], Parts]
    encoder: str | None = None  # the module between embeddings and pooler, where padding is taken out; None: there is none
    causal: bool = False

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.layers).children())


def _bert(layer: Any) -> Parts:
    own, out, last = layer.attention.self, layer.attention.output, layer.output
    if layer.is_decoder or layer.add_cross_attention:
        raise NotImplementedError("decoders are not served")
    if getattr(own, "position_embedding_type", "absolute") != "absolute":
        raise NotImplementedError("relative positions are not served")
    return Parts(
        own.query, own.key, own.value, out.dense, out.LayerNorm, last.LayerNorm, layer.intermediate.dense, last.dense,
        layer.intermediate.intermediate_act_fn, own.num_attention_heads, False, own.dropout.p, out.dropout.p, last.dropout.p,
    )  # fmt: skip


def _distilbert(layer: Any) -> Parts:
    own, mlp = layer.attention, layer.ffn
    return Parts(
        own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm, layer.output_layer_norm, mlp.lin1, mlp.lin2,
        mlp.activation, own.n_heads, False, own.dropout.p, 0.0, mlp.dropout.p,
    )  # fmt: skip


def _clip(layer: Any) -> Parts:
    own, mlp = layer.self_attn, layer.mlp
    return Parts(
        own.q_proj, own.k_proj, own.v_proj, own.out_proj, layer.layer_norm1, layer.layer_norm2, mlp.fc1, mlp.fc2,
        mlp.activation_fn, own.num_heads, True, own.dropout, 0.0, 0.0,
    )  # fmt: skip


def _vit(layer: Any) -> Parts:
    own, mlp, p = layer.attention, layer.mlp, layer.dropout.p
    return Parts(
        own.q_proj, own.k_proj, own.v_proj, own.o_proj, layer.layernorm_before, layer.layernorm_after, mlp.fc1, mlp.fc2,
        mlp.activation_fn, own.num_attention_heads, True, own.attention_dropout, p, p,
    )  # fmt: skip


_BERT = Family("encoder.layer", _bert, "encoder")
FAMILIES = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "CamembertModel": _BERT,
    "ElectraModel": _BERT,
    "DistilBertModel": Family("transformer.layer", _distilbert, "transformer"),
    "CLIPTextModel": Family("encoder.layers", _clip, "encoder", causal=True),
    "CLIPVisionModel": Family("encoder.layers", _clip, "encoder"),
    "ViTModel": Family("layers", _vit),
}


def family_of(module: nn.Module) -> Family | None:
    """By the name of transformers' class, or of one that it derives from; transformers itself need not be installed."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.models.") and cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None
