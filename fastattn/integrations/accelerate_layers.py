"""The encoders that `accelerate` knows: where their layers are, what a layer is made of, and how it is computed.

B, L, C, T: sequences, padded length, hidden size, real tokens. x is (T, C) of a packed batch, else (B, L, C).
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.biases import Bias
from fastattn.kept import Made, kept, nothing_kept
from fastattn.masks import Mask
from fastattn.ops.attention import attention
from fastattn.ops.dispatch import autocast_dtype
from fastattn.ops.ffn import ffn
from fastattn.ops.linear import linear
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
ACTIVATION_HOMES = ("transformers.activations", "torch.nn.modules.activation")


class Parts(NamedTuple):
    """What a layer is made of. Post-norm: y = LN(x + attention(x)), LN(y + ffn(y)); pre-norm: y = x + attention(LN(x)),
    y + ffn(LN(y)). Numbers (heads, scale, eps, dropout) are read from the modules in each call."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    first_norm: nn.LayerNorm
    second_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    activation: nn.Module
    attention: nn.Module  # what holds the numbers of attention
    attention_output_dropout: nn.Module | None = None  # of what attention adds
    ffn_output_dropout: nn.Module | None = None
    # T5's
    gate: nn.Linear | None = None  # beside `up`, whose activation it multiplies
    hidden_dropout: nn.Module | None = None  # of what `down` is given
    relative: nn.Embedding | None = None  # of the first layer: a bias for each bucket of distances


LINEARS, NORMS = ("query", "key", "value", "out", "up", "down"), ("first_norm", "second_norm")
DROPOUTS = ("attention_output_dropout", "ffn_output_dropout", "hidden_dropout")


def activation_name(module: nn.Module) -> str | None:
    """Our name of what an activation module computes; None: not served."""
    if type(module).__module__ not in ACTIVATION_HOMES:
        return None
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATION_CLASSES.get(type(module).__name__)


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


def compute(family: Family, parts: Parts, x: Tensor, batch: Batch) -> Tensor:
    """A layer's output, of x's shape."""
    first, second, up, down = parts.first_norm, parts.second_norm, parts.up, parts.down
    activation = activation_name(parts.activation)
    assert activation is not None
    training = parts.attention.training and not torch.is_grad_enabled() and not traced(x)
    with nothing_kept() if training else contextlib.nullcontext():
        normal = _norm(first, x) if family.pre_norm else x
        y = linear(attended(family, parts, normal, batch), parts.out.weight, parts.out.bias)
        dropout = rate(parts.attention_output_dropout)
        if family.pre_norm:
            normal, x = _norm_of_sum(second, y, x, dropout, return_sum=True)
        else:
            normal = x = _norm_of_sum(first, y, x, dropout)
        y = ffn(normal, up.weight, up.bias, down.weight, down.bias, activation=activation)
        dropout = rate(parts.ffn_output_dropout)
        if family.pre_norm:  # no norm follows in the layer, so that this dropout is PyTorch's
            return x + (F.dropout(y, dropout) if dropout else y)
        return _norm_of_sum(second, y, x, dropout)


def rate(dropout: nn.Module | None) -> float:
    """Of an nn.Dropout, or of nothing or an nn.Identity, which many put in its place, in its mode of now."""
    return getattr(dropout, "p", 0.0) if dropout is not None and dropout.training else 0.0


def _norm(norm: nn.LayerNorm, x: Tensor) -> Any:
    return add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)


def _norm_of_sum(norm: nn.LayerNorm, y: Tensor, x: Tensor, dropout: float, return_sum: bool = False) -> Any:
    """LayerNorm of dropout(y) + x in the dtype that PyTorch gives it: the wider one, and under autocast on a GPU fp32."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    if x.is_cuda and not return_sum and autocast_dtype(x) is not None:
        dtype = torch.float32
    return add_layer_norm(y.to(dtype), x, norm.weight, norm.bias, eps=norm.eps, dropout=dropout, return_sum=return_sum)


def attended(family: Family, parts: Parts, x: Tensor, batch: Batch, bias: Bias | Tensor | None = None) -> Tensor:
    """What attention gives each token before the last projection: (..., H D)."""
    head_size, scale = (getattr(parts.attention, name) for name in (family.head_size, family.scale))
    dropout = family.rate_of_attention(parts.attention)
    joined = _joined(parts)
    if joined is not None:
        q, k, v = linear(x, *joined).unflatten(-1, (3, -1, head_size)).unbind(-3)
    else:
        projections = parts.query, parts.key, parts.value
        q, k, v = (linear(x, part.weight, part.bias).unflatten(-1, (-1, head_size)) for part in projections)
    if batch.packing is not None:
        return varlen_attention(q, k, v, batch.packing, batch.mask, bias=bias, scale=scale, dropout=dropout).flatten(-2)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return attention(q, k, v, batch.mask, bias=bias, scale=scale, dropout=dropout).transpose(1, 2).flatten(-2)


def _joined(parts: Parts) -> tuple[Tensor, Tensor | None] | None:
    """Weight (3 H D, C) and bias of query, key and value as one, where a single product is worth it.

    On a CPU a copy that is kept; on a GPU, where asking whether a copy is still right would wait, one made in each call of
    inference, which is expected to cost less than two more products.
    """
    projections = parts.query, parts.key, parts.value
    weights: list[Tensor] = [part.weight for part in projections]
    biases: list[Tensor] = [part.bias for part in projections if part.bias is not None]

    def join() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # packed copies of the copy are kept of what has a version
            return Made(torch.cat(weights), requires_grad=False)

    if torch.is_grad_enabled() or len(biases) not in (0, 3) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight: Tensor | None = None
    if weights[0].is_cuda:
        weight = torch.cat(weights)
    elif not traced(weights[0]):
        weight = kept(weights, "joined", join)
    return None if weight is None else (weight, torch.cat(biases) if biases else None)


# Families


class Family(NamedTuple):
    """Attribute paths: of the list of layers in a model, and of each part in a layer."""

    layers: str
    parts: dict[str, str]  # name in Parts -> path in a layer
    head_size: str  # in the attention module
    scale: str
    attention_dropout: str  # a probability, or a module that has one
    pre_norm: bool
    encoder: str | None = None  # the module between embeddings and pooler, where padding is taken out; None: there is none
    causal: bool = False
    relative: bool = False  # T5: accelerate_t5 has its layers, the first of which takes padding out
    optional: tuple[tuple[str, str], ...] = ()  # parts that not all layers have, or that have another path in some

    @property
    def unpads(self) -> bool:
        return self.encoder is not None or self.relative

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.layers).children())

    def parts_of(self, layer: nn.Module) -> Parts:
        """Raises AttributeError where a layer has not all of them."""
        parts = {name: operator.attrgetter(path)(layer) for name, path in self.parts.items()}
        for name, path in self.optional:
            with contextlib.suppress(AttributeError):
                parts[name] = operator.attrgetter(path)(layer)
        if "up" not in parts:
            raise AttributeError("it has no first product of an FFN")
        return Parts(**parts)

    def dropout_of_attention(self, attention: nn.Module) -> float:
        """In training; transformers asks the module that holds the dropout whether it is."""
        dropout = getattr(attention, self.attention_dropout)
        return getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout

    def rate_of_attention(self, attention: nn.Module) -> float:
        return self.dropout_of_attention(attention) if attention.training else 0.0


_BERT = Family(
    "encoder.layer",
    {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "first_norm": "attention.output.LayerNorm",
        "second_norm": "output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "activation": "intermediate.intermediate_act_fn",
        "attention": "attention.self",
        "attention_output_dropout": "attention.output.dropout",
        "ffn_output_dropout": "output.dropout",
    },
    head_size="attention_head_size",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    encoder="encoder",
)
_DISTILBERT = Family(
    "transformer.layer",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "out": "attention.out_lin",
        "first_norm": "sa_layer_norm",
        "second_norm": "output_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "activation": "ffn.activation",
        "attention": "attention",
        "ffn_output_dropout": "ffn.dropout",
    },
    head_size="attention_head_size",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=False,
    encoder="transformer",
)
_CLIP = Family(
    "encoder.layers",
    {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "first_norm": "layer_norm1",
        "second_norm": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "activation": "mlp.activation_fn",
        "attention": "self_attn",
    },
    head_size="head_dim",
    scale="scale",
    attention_dropout="dropout",
    pre_norm=True,
    encoder="encoder",
)
_VIT = Family(
    "layers",
    {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.o_proj",
        "first_norm": "layernorm_before",
        "second_norm": "layernorm_after",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "activation": "mlp.activation_fn",
        "attention": "attention",
        "attention_output_dropout": "dropout",
        "ffn_output_dropout": "dropout",
    },
    head_size="head_dim",
    scale="scaling",
    attention_dropout="attention_dropout",
    pre_norm=True,
)
_T5 = Family(
    "block",
    {
        "query": "layer.0.SelfAttention.q",
        "key": "layer.0.SelfAttention.k",
        "value": "layer.0.SelfAttention.v",
        "out": "layer.0.SelfAttention.o",
        "first_norm": "layer.0.layer_norm",
        "second_norm": "layer.1.layer_norm",
        "down": "layer.1.DenseReluDense.wo",
        "activation": "layer.1.DenseReluDense.act",
        "attention": "layer.0.SelfAttention",
        "attention_output_dropout": "layer.0.dropout",
        "ffn_output_dropout": "layer.1.dropout",
        "hidden_dropout": "layer.1.DenseReluDense.dropout",
    },
    head_size="key_value_proj_dim",
    scale="scaling",
    attention_dropout="dropout",
    pre_norm=True,
    relative=True,
    optional=(  # a gated FFN has two first products
        ("up", "layer.1.DenseReluDense.wi"),
        ("up", "layer.1.DenseReluDense.wi_0"),
        ("gate", "layer.1.DenseReluDense.wi_1"),
        ("relative", "layer.0.SelfAttention.relative_attention_bias"),
    ),
)
FAMILIES = {
    **dict.fromkeys(("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "ElectraModel"), _BERT),
    "DistilBertModel": _DISTILBERT,
    "CLIPTextModel": _CLIP._replace(causal=True),
    "CLIPVisionModel": _CLIP,
    "ViTModel": _VIT,
    "T5Stack": _T5,
}


def own_class(module: nn.Module) -> type | None:
    """transformers' class that a module is of, or derives from, if it is one that is served; transformers itself need not be
    installed."""
    return next(
        (c for c in type(module).__mro__ if c.__module__.startswith("transformers.models.") and c.__name__ in FAMILIES), None
    )
