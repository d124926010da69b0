"""Whether the layers of an encoder are exactly what they seem, and whether they still are: asked in each call.

What a layer computes is known from transformers' source alone if every module in it is of transformers' own class or a plain part
of PyTorch's, runs its class's `forward`, and has no hooks. `Examined` looks at all of it, and `holds` tells in a few microseconds
that nothing of it has changed since.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn.integrations.accelerate_families import own_class
from fastattn.integrations.accelerate_parts import CROSS_LINEARS, DROPOUTS, LINEARS, NORMS, SCALES, Family, Held, Parts
from fastattn.nn.plain import HOOKS

HOMES = ("transformers.models.", "torch.nn.")
GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in HOOKS]
# of a config: the name of an attention function, which may be anybody's, and what masks are made of
SETTINGS = ("_attn_implementation_internal", "is_decoder", "sliding_window", "local_attention")
PLAIN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*LINEARS, *CROSS_LINEARS), (nn.Linear,)),
    **dict.fromkeys((*NORMS, "cross_norm"), (nn.LayerNorm,)),
    **dict.fromkeys(DROPOUTS, (nn.Dropout, nn.Identity, Held)),
    **dict.fromkeys(SCALES, (Held,)),
    "joined": (nn.Linear,),
    "gate": (nn.Linear,),
    "relative": (nn.Embedding,),
}
PLAIN_CLASSES = {cls for classes in PLAIN.values() for cls in classes}


class Found(NamedTuple):
    """What a look at an encoder found.

    parts: of each layer module; empty where there is a refusal.
    refusal: why the layers cannot be computed from their weights, or None.
    hooked: the layer, or what stands beside it, whose own hooks see its input and output, (B, L, C), or None.
    """

    parts: dict[nn.Module, Parts]
    refusal: str | None
    hooked: str | None


class Examined:
    """What was `found`, and all that it rests on."""

    def __init__(self, model: nn.Module, family: Family, ours: dict[nn.Module, Any]) -> None:
        """ours: what stands as `forward` on modules of the model and was put there by us."""
        self._note(model, family, ours)
        self.found = look(model, family, ours)

    def holds(self) -> bool:
        """Whether modules, their order and classes, hooks and instance attributes are what they were, by identity.

        C loops over lists made in advance: what it costs is in the benchmark (`benchmarks.guards`).
        """
        return (
            not any(self._empty)
            and not (torch.is_grad_enabled() and any(self._empty_backward))
            and self._filled == self._contents
            and [*map(type, self._modules)] == self._types
            and [*map(len, self._attributes)] == self._counts
            and [d.get("forward") for d in self._forwards] == self._ours
            and [c.forward for c in self._classes] == self._methods
            and [*map(self._config.get, SETTINGS)] == self._settings
        )

    def _note(self, model: Any, family: Family, ours: dict[nn.Module, Any]) -> None:
        chain = [model, *_between(model, family)]
        layers = family.layers_of(model).values()
        beside = _beside_layers(model, family).values()
        self._modules = [*chain, *(m for x in (*layers, *beside) for m in x.modules()), *_shared(model, family)]
        self._types = [*map(type, self._modules)]
        self._attributes = [vars(m) for m in self._modules[1:]]  # a `forward` set on an instance is one more
        self._counts = [*map(len, self._attributes)]
        self._forwards = [vars(m) for m in ours if m is not model]  # others may wrap the model's
        self._ours = [d.get("forward") for d in self._forwards]
        inside = self._modules[len(chain) :]
        children = [m._modules for m in self._modules if m._modules]  # what a Linear were to gain, its forward would not call
        forward = [*children, *GLOBAL_HOOKS[:2], *(getattr(m, name) for m in inside for name in HOOKS[:2])]
        backward = [*GLOBAL_HOOKS[2:], *(getattr(m, name) for m in inside for name in HOOKS[2:])]
        self._empty, self._empty_backward = ([x for x in some if not x] for some in (forward, backward))
        self._filled = [x for x in forward + backward if x]
        self._contents = [dict(x) for x in self._filled]
        self._classes: list[Any] = [*dict.fromkeys(self._types)]
        self._methods = [c.forward for c in self._classes]
        self._config = vars(model.config)
        self._settings = [*map(self._config.get, SETTINGS)]


def look(model: nn.Module, family: Family, ours: dict[nn.Module, Any]) -> Found:
    """Read all that can be read of an encoder's layers. Traceable, and then guarded by what it read."""
    try:
        return _look(model, family, ours)
    except _Refused as refused:
        return Found({}, refused.args[0], None)


def _look(model: nn.Module, family: Family, ours: dict[nn.Module, Any]) -> Found:
    if any(GLOBAL_HOOKS):
        raise _Refused("there are hooks on every module, which would not run")
    own: Any = own_class(model)
    if type(model).forward is not own.forward:  # type: ignore[attr-defined]
        raise _Refused(f"{type(model).__name__} has a forward of its own")
    if "forward" in vars(model) and model not in ours:
        raise _Refused(f"a forward was set on the {own.__name__}")
    for module in _between(model, family):
        _check_class(module, type(module).__name__, own.__module__)
        _check_forward(module, type(module).__name__, ours)
    parts, hooked = {}, None
    for name, layer in family.layers_of(model).items():
        if ours and layer not in ours:
            raise _Refused(f"layer {name} was put in after accelerate")
        parts[layer] = _parts(layer, model, family, own.__module__, ours)
        if has_hooks(layer):
            if family.hands_bias:
                raise _Refused(f"layer {name} has hooks, which would see another bias")
            hooked = f"layer {name} has hooks, which see all positions"
    return Found(parts, None, hooked or _watched(model, family))


class _Refused(Exception):
    pass


def _between(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules on the way from a model to its layers, their lists included, without the model."""
    names = family.root.split(".")
    chain = [model.get_submodule(".".join(names[: i + 1])) for i in range(len(names))]
    for path in family.layers.split(".*.")[1:]:
        groups = [*chain[-1].children()]
        chain += [*groups, *(group.get_submodule(path) for group in groups)]
    return chain


def _beside_layers(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Modules that are given tokens without their padding, and are no layers: by name. Where no module stands around the layers
    alone, those of the model, its embeddings apart."""
    if not family.unpads:
        return {}
    owner = model if family.encoder is None else model.get_submodule(family.encoder)
    lists = model.get_submodule(family.root)
    found = {name: x for name, x in owner.named_children() if x is not lists}
    return {name: x for name, x in found.items() if owner is not model or "emb" not in name}


def _watched(model: nn.Module, family: Family) -> str | None:
    """Why one of those has to be given all positions, or None."""
    for name, beside in _beside_layers(model, family).items():
        for module in beside.modules():
            if not type(module).__module__.startswith(HOMES):
                return f"{name} is a {_described(type(module))}, which may look at all positions"
            if has_hooks(module):
                return f"{name} has hooks, which see all positions"
    return None


def _shared(model: nn.Module, family: Family) -> list[nn.Module]:
    """Parts of all layers that lie outside of them."""
    return [model.get_submodule(path) for _, path in family.shared]


def _parts(layer: nn.Module, model: nn.Module, family: Family, home: str, ours: dict[nn.Module, Any]) -> Parts:
    if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
        raise _Refused("decoders are not served")
    for name in family.absent:
        if getattr(layer, name, None) is not None:
            raise _Refused(f"it has a part {name}, which is not served")
    try:
        parts = family.parts_of(layer, model)
    except AttributeError as error:
        raise _Refused(f"a {type(layer).__name__} is made otherwise: {error}") from None
    names = {id(part): name for name, part in zip(parts._fields, parts, strict=True) if part is not None}
    for name, classes in PLAIN.items():
        part = getattr(parts, name)
        if family.rms is not None and name in NORMS:
            if not type(part).__name__.endswith(family.rms):  # whose home is looked at below
                raise _Refused(f"{name} is a {_described(type(part))}, not a {family.rms}")
        elif name == "first_norm" and family.pre_norm and type(part) is nn.Identity:
            continue
        elif part is not None and type(part) not in classes:
            raise _Refused(f"{name} is a {_described(type(part))}, not a plain {classes[0].__name__}")
    if family.activation_of(parts) is None:
        raise _Refused(f"activation {_described(type(parts.activation))} is not served")
    if family.buckets is not None and parts.relative.num_embeddings != family.buckets[0]:  # type: ignore[union-attr]
        raise _Refused(f"its bias is of {parts.relative.num_embeddings} distances, not {family.buckets[0]}")  # type: ignore[union-attr]
    heads: list[Any] = [parts.value, parts.key] if family.grouped else [parts.value, parts.key, parts.query]
    if parts.joined is None and len({part.weight.shape for part in heads}) != 1:
        raise _Refused("query, key and value are of different sizes")
    crossed: list[Any] = [parts.cross_query, parts.cross_key, parts.cross_value]  # keys and values may be of another width
    if parts.cross_query is not None and len({part.weight.shape[0] for part in crossed}) != 1:
        raise _Refused("query, key and value of its cross attention are of different sizes")
    for path, module in [*layer.named_modules(), *((path, model.get_submodule(path)) for _, path in family.shared)]:
        name = names.get(id(module), path) or type(layer).__name__
        if type(module) not in PLAIN_CLASSES and module is not parts.activation:
            _check_class(module, name, home)
        _check_forward(module, name, ours)
        if module is not layer and has_hooks(module):
            raise _Refused(f"{name} has hooks, which would not run")
    return parts


def _check_class(module: nn.Module, name: str, home: str) -> None:
    """home: the module of transformers' that defines the model."""
    cls = type(module)
    if type(module) is nn.ModuleList:
        return
    if cls.__module__ != home:
        raise _Refused(f"{name} is a {_described(cls)}, which may compute anything")
    if cls.forward.__module__ != home:
        raise _Refused(f"{name}: {cls.__name__}.forward was replaced by {cls.forward.__module__}'s")


def _check_forward(module: nn.Module, name: str, ours: dict[nn.Module, Any]) -> None:
    if vars(module).get("forward") is not ours.get(module):
        raise _Refused(f"a forward was set on {name}")


def has_hooks(module: nn.Module) -> bool:
    """Other than transformers' own, which record what a call asks to be recorded: such calls are looked at otherwise."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _described(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}" if cls.__name__ in ("Linear", "LayerNorm", "Dropout") else cls.__name__
