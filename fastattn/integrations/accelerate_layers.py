"""The encoders that `accelerate` knows: where their layers are, what a layer is made of, and how it is computed.

B, L, C, T: sequences, padded length, hidden size, real tokens. x is (T, C) of a packed batch, else (B, L, C).
"""

from __future__ import annotations

import operator
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


LINEARS, NORMS = ("query", "key", "value", "out", "up", "down"), ("first_norm", "second_norm")


class Parts(NamedTuple):
    """What a layer is made of. Post-norm: y = LN(x + attention(x)), LN(y + ffn(y)); pre-norm: y = x + attention(LN(x)),
    y + ffn(LN(y))."""

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
    attention_dropout: float
    attention_output_dropout: float = 0.0  # of what attention adds
    ffn_output_dropout: float = 0.0

    def refusal(self) -> str | None:
        """Why a layer cannot be computed from its weights: a part is wrapped, quantized, has hooks; None if it can."""
        for names, kind in ((LINEARS, nn.Linear), (NORMS, nn.LayerNorm)):
            for name in names:
                part = getattr(self, name)
                if type(part) is not kind:
                    return f"{name} is a {type(part).__name__}, not a plain {kind.__name__}"
                if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
                    return f"{name} has hooks, which would not run"
        if type(self.activation).__name__ not in ACTIVATION_CLASSES:
            return f"activation {type(self.activation).__name__} is not served"
        return None


def traced(x: Tensor) -> bool:
    """Whether what happens now will be run again without this code: nothing may be read on the host or kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Batch(NamedTuple):
    """Of one call: how its tokens lie, what beside that hides one from another, and what each layer is made of."""

    packing: Packing | None
    mask: Mask | None
    parts: list[Parts]
    pre_norm: bool


class Layer:
    """A layer by its number, and the copies of its weights that inference keeps."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._joined: tuple[Any, Tensor, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_joined": None}  # copies of weights are not saved

    def forget(self) -> None:
        self._joined = None

    def joined(self, parts: Parts) -> tuple[Tensor, Tensor | None] | None:
        """Weight (3C, C) and bias of query, key and value as one, kept while theirs stay as they are; inference alone."""
        projections = parts.query, parts.key, parts.value
        weights = [part.weight for part in projections]
        biases = [part.bias for part in projections if part.bias is not None]
        if torch.is_grad_enabled() or traced(weights[0]) or len(biases) not in (0, 3):
            return None
        if any(x.is_inference() for x in weights + biases):  # it has no version to tell whether it was changed
            return None
        state = [(x.data_ptr(), x._version, x.dtype, x.device) for x in weights + biases]
        if self._joined is None or self._joined[0] != state:
            with torch.inference_mode(False):  # for packed copies, which need a version too
                weight, *bias = (torch.cat([x.detach() for x in some]) for some in (weights, biases) if some)
            self._joined = state, weight, bias[0] if bias else None
        return self._joined[1:]


def compute(layer: Layer, x: Tensor, batch: Batch, training: bool) -> Tensor:
    parts, pre_norm = batch.parts[layer.index], batch.pre_norm

    def dropped(y: Tensor, p: float) -> Tensor:
        return F.dropout(y, p, training) if p > 0 else y

    first, second, up, down = parts.first_norm, parts.second_norm, parts.up, parts.down
    activation = ACTIVATION_CLASSES[type(parts.activation).__name__]
    normal = _norm(first, x, None) if pre_norm else x
    attended = linear(_attended(layer, parts, normal, batch), parts.out.weight, parts.out.bias)
    attended = dropped(attended, parts.attention_output_dropout)
    if pre_norm:
        normal, x = add_layer_norm(attended, x, second.weight, second.bias, eps=second.eps, return_sum=True)
    else:
        normal = x = _norm(first, attended, x)
    y = ffn(normal, up.weight, up.bias, down.weight, down.bias, activation=activation)
    y = dropped(y, parts.ffn_output_dropout)
    return x + y if pre_norm else _norm(second, y, x)


def _norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None) -> Any:
    return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps)


def _attended(layer: Layer, parts: Parts, x: Tensor, batch: Batch) -> Tensor:
    """What attention gives each token before the last projection: x's shape, (..., H D)."""
    joined = layer.joined(parts)
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
    """Attribute paths: of the list of layers in a model, and of each part in a layer."""

    layers: str
    names: tuple[str, ...]  # in the order of Parts
    pre_norm: bool
    encoder: str | None = None  # the module between embeddings and pooler, where padding is taken out; None: there is none
    causal: bool = False

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.layers).children())

    def parts(self, layer: nn.Module) -> Parts | str:
        """As they are now (an adapter may have been put in, dropout been changed), or why the layer is not served."""
        if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
            return "decoders are not served"
        parts = Parts(*operator.attrgetter(*self.names)(layer))
        return parts.refusal() or parts


_BERT = Family(
    "encoder.layer",
    (
        *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        *("attention.output.LayerNorm", "output.LayerNorm", "intermediate.dense", "output.dense"),
        *("intermediate.intermediate_act_fn", "attention.self.num_attention_heads", "attention.self.dropout.p"),
        *("attention.output.dropout.p", "output.dropout.p"),
    ),
    pre_norm=False,
    encoder="encoder",
)
_DISTILBERT = Family(
    "transformer.layer",
    (
        *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm", "output_layer_norm"),
        *("ffn.lin1", "ffn.lin2", "ffn.activation", "attention.n_heads", "attention.dropout.p"),
    ),
    pre_norm=False,
    encoder="transformer",
)
_CLIP = Family(
    "encoder.layers",
    (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2"),
        *("mlp.fc1", "mlp.fc2", "mlp.activation_fn", "self_attn.num_heads", "self_attn.dropout"),
    ),
    pre_norm=True,
    encoder="encoder",
)
_VIT = Family(
    "layers",
    (
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "layernorm_before", "layernorm_after"),
        *("mlp.fc1", "mlp.fc2", "mlp.activation_fn", "attention.num_attention_heads", "attention.attention_dropout"),
        *("dropout.p", "dropout.p"),
    ),
    pre_norm=True,
)
FAMILIES = {
    **dict.fromkeys(("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel"), _BERT),
    "DistilBertModel": _DISTILBERT,
    "CLIPTextModel": _CLIP._replace(causal=True),
    "CLIPVisionModel": _CLIP,
    "ViTModel": _VIT,
}


def family_of(module: nn.Module) -> Family | None:
    """By the name of transformers' class, or of one that it derives from; transformers itself need not be installed."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.models.") and cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None
