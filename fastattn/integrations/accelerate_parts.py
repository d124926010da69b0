"""What a layer of an encoder is made of, and how a family of encoders is described: attribute paths, and how a layer computes.

`accelerate_families` has the families, `accelerate_layers` computes a layer from its parts.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any, NamedTuple

from torch import nn

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


class Held:
    """A rate or a parameter that a module holds under a name. It is read in each call, as a module's own are."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    # as of an nn.Dropout
    @property
    def p(self) -> float:
        return self.value

    @property
    def training(self) -> bool:
        return self.owner.training


class Parts(NamedTuple):
    """What a layer is made of. Post-norm: y = LN(x + attention(x)), LN(y + ffn(y)); pre-norm: y = x + attention(LN(x)),
    y + ffn(LN(y)). Numbers (heads, scale, eps, dropout) are read from the modules in each call.

    Between the two, a post-norm layer that has cross attention, and is given states to attend to, has
    y = LN(y + cross attention(y, states))."""

    out: nn.Linear
    first_norm: nn.LayerNorm  # or nn.Identity
    second_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    attention: nn.Module  # what holds the numbers of attention
    query: nn.Linear | None = None
    key: nn.Linear | None = None
    value: nn.Linear | None = None
    joined: nn.Linear | None = None  # query, key and value as one, in place of the three
    activation: nn.Module | None = None  # None: the family says which
    attention_output_dropout: nn.Module | Held | None = None  # of what attention adds
    ffn_output_dropout: nn.Module | Held | None = None
    hidden_dropout: nn.Module | Held | None = None  # of what `down` is given
    gate: nn.Linear | None = None  # beside `up`, whose activation it multiplies
    relative: nn.Embedding | None = None  # a bias for each bucket of distances
    position_bias: nn.Module | None = None  # gives a bias for each pair of patches
    first_scale: Held | None = None  # of what attention adds: a factor for each feature
    second_scale: Held | None = None  # of what the FFN adds
    drop_path: nn.Module | None = None  # leaves out what a branch adds, in training, for some of the images
    cross_query: nn.Linear | None = None
    cross_key: nn.Linear | None = None
    cross_value: nn.Linear | None = None
    cross_out: nn.Linear | None = None
    cross_norm: nn.LayerNorm | None = None
    cross_attention: nn.Module | None = None  # what holds its numbers
    cross_output_dropout: nn.Module | None = None


LINEARS, NORMS = ("query", "key", "value", "out", "up", "down"), ("first_norm", "second_norm")
CROSS_LINEARS = ("cross_query", "cross_key", "cross_value", "cross_out")
DROPOUTS = ("attention_output_dropout", "ffn_output_dropout", "hidden_dropout", "cross_output_dropout")
SCALES = ("first_scale", "second_scale")
# parts that the layers of `accelerate_plans` and `accelerate_training` have not; they have those of cross attention where
# a call does not use them
BEYOND_PLAIN = ("joined", "hidden_dropout", "gate", "relative", "position_bias", *SCALES, "drop_path")


class Family(NamedTuple):
    """Attribute paths: of the list of layers in a model, and of each part in a layer; and how a layer computes."""

    layers: str  # "a.*.b": the list b in each child of a
    parts: dict[str, str]  # name in Parts -> path in a layer
    head_size: str  # in the attention module
    scale: str | None  # None: 1 / sqrt(head size)
    attention_dropout: str  # in the attention module: a probability, or a module that has one
    pre_norm: bool
    encoder: str | None = None  # the module between embeddings and pooler, which `accelerate_forward` stands before
    # where padding is taken out: at the "encoder"'s entrance, or by the first of the "layers", and then put back at the encoder's
    # exit, or if there is none, in the model's outputs; None: it stays in
    packs: str | None = None
    mask: str | None = "attention_mask"  # the model's argument for padding; None: it has none, or takes no heed of it
    reads_mask: bool = False  # the model does so itself, beside its layers
    # or at the "encoder", which is given the mask that the model makes of its argument: (B, L), or as it is added to scores
    masked_at: str = "model"
    # who hands keyword arguments on as far as the layers: the "model", only its "encoder", or "nobody"
    hands_on: str = "model"
    causal: bool = False
    # the token that poolers and heads read: the "first", the "last", "eos", or the "end" as CLIP knows it, which is eos, or by
    # its first configs the greatest of the ids; or "none"
    pooled: str = "first"
    rms: str | None = None  # the end of the name of its norms, if they are of the root of the mean of squares
    grouped: bool = False  # several heads of queries may have one of keys and values
    hands_bias: bool = False  # a layer is given the bias of the first one beside x, and gives it beside its output
    buckets: tuple[int, int] | None = None  # of `relative`: how many, and the greatest distance; None: attention has them
    # arguments of layers that are a bias of all pairs, which they share, and what in the attention module says that each is read:
    # their sum, if the first is there; layers may have their own beside it, `position_bias`
    pair_bias: tuple[tuple[str, str | None], ...] = ()
    bias_scaled: bool = False  # as scores are
    rotary: bool = False  # layers are given `position_embeddings`, for all tokens or for all but the first ones
    window: str | None = None  # in the attention module: None, or the number of positions to one side, and one more
    key_unbiased: bool = False  # where query and value have a bias
    gated: bool = False  # `up` gives what is activated, and then its factor
    activation: str | None = None  # where it is no module
    clamps: str | None = None  # in float16: "always", or what "overflows", or "inside" of a layer, where it is not served
    dropout_called: bool = False  # attention calls the module that has its dropout, which then is in a mode of its own
    tuples: bool = False  # a layer gives a tuple, its output alone
    stable: str | None = None  # what a config has where layers are pre-norm
    absent: tuple[str, ...] = ()  # parts of a layer that are not served
    # serves `is_decoder`, which makes it causal, and `encoder_hidden_states`, a layer's second argument; post-norm
    decodes: bool = False
    variants: tuple[dict[str, str], ...] = ()  # more parts: those of the first of these of which a layer has all
    optional: tuple[tuple[str, str], ...] = ()  # parts that not all layers have
    shared: tuple[tuple[str, str], ...] = ()  # parts that lie in the model, for all layers

    def of(self, config: Any) -> Family:
        """As it is under a config."""
        return self._replace(pre_norm=bool(getattr(config, self.stable))) if self.stable is not None else self

    @property
    def unpads(self) -> bool:
        return self.packs is not None

    @property
    def measures(self) -> bool:
        """Whether distances between tokens count, which are others without what is between them."""
        return self._has("relative") or self.window is not None

    @property
    def plain(self) -> bool:
        """Whether a layer is no more than what `Numbers` of accelerate_plans has."""
        beyond = self.rms, self.grouped, self.key_unbiased, self.given, self.window, self.gated, self.activation, self.clamps
        return not any(beyond)

    @property
    def given(self) -> bool:
        """Whether a layer is given something beside x."""
        return self._has("relative") or bool(self.pair_bias) or self.rotary

    def _has(self, part: str) -> bool:
        return any(name == part for name, _ in (*self.optional, *self.shared))

    @property
    def root(self) -> str:
        return self.layers.split(".*.")[0]

    def layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """By their path below `root`."""
        _, *deeper = self.layers.split(".*.")
        found = dict(model.get_submodule(self.root).named_children())
        for path in deeper:
            lists = {f"{name}.{path}": child.get_submodule(path) for name, child in found.items()}
            found = {f"{name}.{n}": layer for name, layers in lists.items() for n, layer in layers.named_children()}
        return found

    def parts_of(self, layer: nn.Module, model: nn.Module) -> Parts:
        """Raises AttributeError where a layer has not all of them."""
        parts = {name: _part(layer, path) for name, path in self.parts.items()}
        for variant in self.variants:
            with contextlib.suppress(AttributeError):
                parts |= {name: _part(layer, path) for name, path in variant.items()}
                break
        for name, path in self.optional:
            with contextlib.suppress(AttributeError):
                parts[name] = _part(layer, path)
        parts |= {name: _part(model, path) for name, path in self.shared}
        for name in Parts._fields:
            if name not in parts and name not in Parts._field_defaults:
                raise AttributeError(f"it has no part that is its {name}")
        return Parts(**parts)

    def activation_of(self, parts: Parts) -> str | None:
        """Our name of it; None: not served."""
        return self.activation if parts.activation is None else activation_name(parts.activation)

    def scale_of(self, attention: nn.Module) -> float:
        return getattr(attention, self.head_size) ** -0.5 if self.scale is None else getattr(attention, self.scale)

    def dropout_of_attention(self, attention: nn.Module) -> float:
        """In training; transformers asks the module that holds the dropout whether it is."""
        dropout = getattr(attention, self.attention_dropout)
        return getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout

    def rate_of_attention(self, attention: nn.Module) -> float:
        training = getattr(attention, self.attention_dropout).training if self.dropout_called else attention.training
        return self.dropout_of_attention(attention) if training else 0.0


def _part(owner: nn.Module, path: str) -> Any:
    """A module, or None; of a number or a parameter, where it is held."""
    found = operator.attrgetter(path)(owner)
    if found is None or isinstance(found, nn.Module):
        return found
    *above, name = path.split(".")
    return Held(owner.get_submodule(".".join(above)), name)


def activation_name(module: nn.Module) -> str | None:
    """Our name of what an activation module computes; None: not served."""
    if type(module).__module__ not in ACTIVATION_HOMES:
        return None
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATION_CLASSES.get(type(module).__name__)


def inside(block: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(block)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def own_name(module: Any) -> str | None:
    """The full name of a module's class; None where its forward is not the one that was written for it."""
    cls: Any = type(module)
    return full_name(cls) if getattr(getattr(cls, "forward", None), "__module__", None) == cls.__module__ else None
