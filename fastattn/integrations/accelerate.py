"""`accelerate(model)`: a Hugging Face encoder, in place and reversibly, on fastattn's ops and without its padding.

Some modules get a `forward` of their own, on the instance alone; classes, parameters and state_dict stay as they are.
- The model reads the padding mask and makes a `Batch` of it, which travels as a keyword argument through transformers' own code.
- The encoder lays the real tokens end to end at its entrance, (B, L, C) -> (T, C), and puts them back at its exit.
- A layer that is given a Batch computes with fused ops; without one it does what it always did.
- A head that takes labels lets the encoders inside see them: where padding has a label, padding stays in.
`accelerate_layers` says which classes there are and how their layers are made up; `accelerate_checks`, whether they are what they
seem; `accelerate_proof` compares a layer with its own code.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations.accelerate_checks import Examined
from fastattn.integrations.accelerate_heads import keeps_padding, labels_inside, reader_among, takes_labels
from fastattn.integrations.accelerate_layers import FAMILIES, Batch, Family, Parts, compute, own_class, traced
from fastattn.integrations.accelerate_proof import Proof, as_in_evaluation, tell
from fastattn.integrations.keywords import HARMLESS
from fastattn.kept import clear_packed
from fastattn.packing import Packing, check_sizes

logger = logging.getLogger("fastattn")
KEYWORD = "fastattn_batch"
UNPAD = ("auto", "always", "never")
PADDING_ALONE = "only a padding mask (batch, length) is served, got"
_lock = threading.RLock()  # held while an encoder is examined or proves itself


class Replaced:
    """What stands as `forward` on a module: `function(replaced, *args, **kwargs)`, until `undo`.

    An object rather than a bound method, so that a copied or unpickled module has one that belongs to it.
    """

    def __init__(self, function: Callable, module: nn.Module, settings: Any) -> None:
        self.function, self.module, self.settings = function, module, settings
        self.before = vars(module).get("forward")
        self.active, self.copied = True, False
        module.forward = self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copied": True}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs) if self.active else self.own(*args, **kwargs)

    @property
    def own(self) -> Callable:
        """What the module does without us."""
        return functools.partial(type(self.module).forward, self.module) if self.before is None else self.before

    @property
    def __code__(self) -> Any:
        """The replaced method's: torch.export names its source lines."""
        return inspect.unwrap(type(self.module).forward).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """The replaced method's: trainers look at it for the names of a model's inputs."""
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def undo(self) -> None:
        """Where another library has wrapped this since, its wrapper stays, around the module's own forward."""
        self.active = False
        if vars(self.module).get("forward") is not self:
            return
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before


@dataclass
class Report:
    """What was done to a model. `str()` of it is for reading."""

    accelerated: dict[str, str] = field(default_factory=dict)  # module -> what is done there
    left: dict[str, str] = field(default_factory=dict)  # module -> why it is as it was
    foreseen: dict[str, str] = field(default_factory=dict)  # module -> which calls will run its own code, and why
    fallbacks: Counter[str] = field(default_factory=Counter)  # why calls ran the model's own code, and how many
    padded: Counter[str] = field(default_factory=Counter)  # why calls kept their padding, and how many

    def __str__(self) -> str:
        named = ((self.accelerated, ""), (self.left, "left as it was: "), (self.foreseen, "to come: "))
        lines = [f"{name or 'model'}: {kind}{what}" for found, kind in named for name, what in found.items()]
        lines += [f"{count} calls ran the model's own code: {why}" for why, count in self.fallbacks.items()]
        return "\n".join(lines + [f"{count} calls kept their padding: {why}" for why, count in self.padded.items()])


@dataclass
class Encoder:
    """What is known of one, and how it is to be computed."""

    family: Family
    name: str
    inputs: list[str]  # names of the model's arguments
    report: Report
    strict: bool
    capacity: int | None
    unpad: str
    reader: str | None  # why padding is always read, or None
    reads_first: bool  # whether the first token of each sequence is read, padding or not
    unproven: bool
    layers: list[Layer] = field(default_factory=list)
    ours: dict[nn.Module, Replaced] = field(default_factory=dict)
    examined: Examined | None = None
    differs: str | None = None  # what a proof found
    overflowed: Tensor | None = None  # of the last packed call
    prove: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and proves itself."""
        return {**vars(self), "examined": None, "unproven": self.prove}

    def refusal(self, model: nn.Module) -> str | None:
        """Why the layers are not computed by us, as they are now; what has changed is examined, and has to prove itself."""
        if torch.compiler.is_dynamo_compiling():  # not to be traced; what has changed since the last call is not seen
            return self.differs
        if self.examined is None or not self.examined.holds():
            with _lock:
                self.examine(model)
        assert self.examined is not None
        return self.examined.refusal or self.differs

    def examine(self, model: nn.Module) -> None:
        self.examined = Examined(model, self.family, dict(self.ours))
        self.unproven, self.differs = self.prove, None
        for layer in self.layers:
            self.report.left.pop(self.path(layer.name), None)
            layer.parts = self.examined.parts.get(layer.module)

    def path(self, layer: str) -> str:
        return ".".join(part for part in (self.name, self.family.layers, layer) if part)


@dataclass(eq=False)
class Layer:
    name: str
    module: nn.Module
    family: Family
    parts: Parts | None  # None: it must not be computed by us


class Handle:
    """Undoes `accelerate`; as a context manager at the end of the block."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._replaced: list[Replaced] = []
        self._encoders: list[Encoder] = []

    @property
    def overflowed(self) -> bool:
        """Whether an encoder had more real tokens than `capacity` in its last call, and some were dropped. Waits for a GPU."""
        return any(bool(x.overflowed) for x in self._encoders if x.overflowed is not None)

    def restore(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._replaced.clear()
        clear_packed()

    def refresh(self) -> None:
        """Forget what is known of the model: its next call looks at it and proves it again, and makes copies of weights anew.

        Changes of weights and modules are noticed without it; see `clear_packed` for the one kind of write that is not.
        """
        for encoder in self._encoders:
            encoder.examined = None
        clear_packed()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _replace(self, module: nn.Module, function: Callable, settings: Any) -> Replaced:
        self._replaced.append(Replaced(function, module, settings))
        return self._replaced[-1]


def restore(model: nn.Module) -> None:
    """Undo `accelerate` on a model whose handle is not at hand: a copy, or one that was unpickled."""
    for module in model.modules():
        for value in list(vars(module).values()):  # under another name where a library has put its own in front
            if isinstance(value, Replaced):
                value.undo()
    clear_packed()


def accelerate(
    model: nn.Module, strict: bool = False, *, capacity: int | None = None, prove: bool = True, unpad: str = "auto"
) -> Handle:
    """Let the encoders inside `model` compute real tokens alone, with fused attention, FFN and add + LayerNorm.

    Serves transformers' BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, CLIP (text, vision, both) and ViT: alone,
    with any head on top, or inside another module such as a SentenceTransformer. Outputs at real tokens, losses and gradients are
    those of the model, up to rounding; hidden states at padding are 0. Only the given model is changed.

    What is not exactly what it seems is left to its own code: layers, attention or MLPs of other classes, a `forward` that was
    set or replaced, adapters, quantized or parametrized weights, hooks inside a layer. That is looked at in each call. In its
    first call, and after each such change, an encoder computes its layers both ways and compares.

    Args:
        model: any module; what is not served in it is left as it is and named in the report. Give the whole model, its head
            included: a head may read padding.
        strict: raise where something would be left, and where a call would have to run the model's own code.
        capacity: rows of packed batches, for static shapes: with it nothing is read on the host, so that a call can be traced by
            torch.compile or captured in a CUDA graph without padding. Tokens beyond it are dropped, and `overflowed` says so.
            None: as many as there are; a traced or captured call then keeps its padding.
        prove: False skips the comparison. A call that is traced or captured makes none: make one call before.
        unpad: "auto" leaves padding in where it is known to be read: by a head for question answering, by a loss with labels at
            padding (with a capacity: by any loss with a label for each token), by what reads the first token of a sequence that
            is padded on the left. "always" is your word that it does not matter what stands at padding; "never" fuses and
            leaves it in. Hooks on a layer see (B, L, C), so that with them padding stays in every case.

    Returns:
        A handle with `report`, `overflowed`, `restore()` and `refresh()`, which is a context manager too.

    Raises:
        TypeError, ValueError: an argument does not fit, the model is accelerated already, or `strict` and there is nothing that
            is served.
        NotImplementedError: `strict` and a part of it would be left.

    A call that asks for attention weights or a cache, passes a mask other than padding, or trains with attention dropout runs the
    model's own code; `report.fallbacks` counts it, and the logger "fastattn" says so once for each reason.
    """
    _check(model, capacity, unpad)
    report = Report()
    handle = Handle(report)
    for name, module in model.named_modules():
        cls = own_class(module)
        if cls is None:
            continue
        family = FAMILIES[cls.__name__]
        outside = [(outer, m) for outer, m in model.named_modules() if m is not module and module in set(m.modules())]
        encoder = Encoder(
            family, name, list(inspect.signature(cls.forward).parameters)[1:], report, strict, capacity, unpad,  # type: ignore[attr-defined]
            reader=next((why for _, m in outside if (why := reader_among(m)) is not None), None),
            reads_first=getattr(module, "pooler", None) is not None or any(hasattr(m, "config") for _, m in outside),
            unproven=prove, prove=prove,
        )  # fmt: skip
        refusal = Examined(module, family, {}).refusal
        if refusal is not None:
            report.left[name] = refusal
            continue
        _replace_encoder(handle, module, encoder)
        for _, outer in outside:
            if takes_labels(outer) and not isinstance(vars(outer).get("forward"), Replaced):
                handle._replace(outer, _head_forward, None)
    if strict and (report.left or not report.accelerated):
        handle.restore()
        why = "; ".join(f"{name or 'model'}: {reason}" for name, reason in report.left.items())
        if not why:
            raise ValueError(f"model has no encoder that is served: one of {', '.join(FAMILIES)}")
        raise NotImplementedError(f"strict=True, but not all of the model is served: {why}")
    if not report.accelerated and not report.left:
        report.left[""] = f"no encoder that is served: one of {', '.join(FAMILIES)}"
    return handle


def _check(model: Any, capacity: Any, unpad: Any) -> None:
    if not isinstance(model, nn.Module):
        inner = next((name for name in ("model", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
        hint = "" if inner is None else f": give it .{inner}"
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    check_sizes(capacity=capacity)
    if unpad not in UNPAD:
        raise ValueError(f"unpad must be one of {', '.join(UNPAD)}; got {unpad!r}")
    for name, module in model.named_modules():
        standing = vars(module).get("forward")
        if not isinstance(standing, Replaced):
            continue
        if standing.active and not standing.copied:
            where = name or "the model"
            raise ValueError(f"{where} is accelerated already: call restore() of its handle, or fastattn.restore(model)")
        standing.undo()  # of a copy, whose handle is nowhere


def _replace_encoder(handle: Handle, model: nn.Module, encoder: Encoder) -> None:
    family = encoder.family
    encoder.ours[model] = handle._replace(model, _model_forward, encoder)
    if family.encoder is not None:
        inner = getattr(model, family.encoder)
        encoder.ours[inner] = handle._replace(inner, _encoder_forward, encoder)
    for name, module in model.get_submodule(family.layers).named_children():
        layer = Layer(name, module, family, None)
        encoder.layers.append(layer)
        encoder.ours[module] = handle._replace(module, _layer_forward, layer)
    encoder.examine(model)
    handle._encoders.append(encoder)
    stays = encoder.examined.hooked or (encoder.reader if encoder.unpad == "auto" else None)  # type: ignore[union-attr]
    if family.encoder is None:
        padding = ""
    elif stays is not None or encoder.unpad == "never":
        padding = f"padding stays in ({stays or 'unpad=never'}), "
    else:
        padding = "real tokens alone, "
    what = f"{type(model).__name__}, {len(encoder.layers)} layers: {padding}fused attention, FFN and norms"
    encoder.report.accelerated[encoder.name] = what
    dropout = max(family.dropout_of_attention(layer.parts.attention) for layer in encoder.layers if layer.parts is not None)
    if dropout > 0:
        why = f"calls in training mode will run the model's own code: attention dropout ({dropout}) is not served yet"
        encoder.report.foreseen[encoder.name] = why


# The replaced methods


def _model_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    encoder, model = at.settings, at.module
    inputs = {**dict(zip(encoder.inputs, args, strict=False)), **kwargs}
    why = encoder.refusal(model) or _unserved(encoder, model, inputs)
    mask = inputs.get("attention_mask")
    keep = mask.bool() if why is None and mask is not None else None
    if why is None and encoder.unproven and not _any_traced(inputs):
        with _lock:
            _prove(at, inputs, keep)
        why = encoder.differs
    if why is not None:
        _tell_fallback(encoder, why)
        return at.own(*args, **kwargs)
    batch = _batch(encoder, keep)
    inputs.pop("attention_mask", None)
    outputs = at.own(**inputs, **{KEYWORD: batch})
    return outputs if batch.packing is None else _unpacked(outputs, batch.packing)


def _encoder_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    batch = kwargs.get(KEYWORD)
    if batch is None or batch.packing is None:
        return at.own(*args, **kwargs)
    states, rest = args[:1], args[1:]
    name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
    x = states[0] if states else kwargs.pop(name)
    outputs = at.own(batch.packing.pack(x), *rest, **kwargs)
    outputs.last_hidden_state = batch.packing.unpack(outputs.last_hidden_state)
    return outputs


def _layer_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    layer, batch = at.settings, kwargs.pop(KEYWORD, None)
    if batch is None:
        return at.own(*args, **kwargs)
    x = args[0]
    if isinstance(batch, Proof):
        return batch.compare(layer.name, layer.family, layer.parts, x, functools.partial(at.own, *args, **kwargs))
    module: Any = at.module
    if _checkpoints_in_forward(module):
        return module._gradient_checkpointing_func(functools.partial(compute, layer.family, layer.parts, batch=batch), x)
    return compute(layer.family, layer.parts, x, batch)


def _head_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(at.module).forward).parameters)[1:]
    with labels_inside({**dict(zip(names, args, strict=False)), **kwargs}):
        return at.own(*args, **kwargs)


# What they need


def _checkpoints_in_forward(layer: Any) -> bool:
    """Whether gradient checkpointing is on, and is done by the `forward` that ours stands for.

    Older versions of transformers do it in the layer's `__call__`, around any forward.
    """
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return not any(c.__name__ == "GradientCheckpointingLayer" and "__call__" in vars(c) for c in type(layer).__mro__)


def _tell_fallback(encoder: Encoder, why: str) -> None:
    if encoder.strict:
        raise NotImplementedError(f"strict=True, but this call is not served: {why}")
    if why not in encoder.report.fallbacks and not torch.compiler.is_compiling():
        logger.warning("%s runs its own code: %s", encoder.name or "the accelerated model", why)
    encoder.report.fallbacks[why] += 1


def _unserved(encoder: Encoder, model: Any, inputs: dict[str, Any]) -> str | None:
    """Why a call cannot be served, or None."""
    attentions = (layer.parts.attention for layer in encoder.layers if layer.parts is not None)
    if any(encoder.family.dropout_of_attention(x) > 0 for x in attentions if x.training):
        return "attention dropout in training"
    if inputs.get("use_cache"):
        return "use_cache=True"
    if inputs.get("output_attentions", model.config.output_attentions):
        return "output_attentions=True"
    for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask", "head_mask"):
        if inputs.get(name) is not None:
            return f"{name} was given"
    for name, value in inputs.items():
        if value is not None and value is not False and name not in HARMLESS and name not in encoder.inputs:
            return f"{name} was given"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return f"{PADDING_ALONE} {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
    return None


def _any_traced(inputs: dict[str, Any]) -> bool:
    return any(traced(x) for x in inputs.values() if isinstance(x, Tensor))


def _prove(at: Replaced, inputs: dict[str, Any], keep: Tensor | None) -> None:
    """Sets `unproven` and `differs`. Called with the lock."""
    encoder, model = at.settings, at.module
    if not encoder.unproven:
        return
    proof = Proof(_padded(encoder, keep), keep)
    with as_in_evaluation(model):
        at.own(**inputs, **{KEYWORD: proof})
    if proof.difference is not None:
        encoder.differs = tell(proof.difference)
        encoder.report.left[encoder.path(proof.difference[0])] = encoder.differs
    encoder.unproven = proof.difference is None and proof.compared < len(encoder.layers)


def _batch(encoder: Encoder, keep: Tensor | None) -> Batch:
    """How the tokens of a call lie, and what hides them from one another."""
    if keep is None or encoder.family.encoder is None:
        return _padded(encoder, keep)
    stays = _padding_stays(encoder, keep)
    if stays is not None:
        encoder.report.padded[stays] += 1
        return _padded(encoder, keep)
    if encoder.capacity is None and traced(keep):
        return _padded(encoder, keep)
    packing = Packing.from_mask(keep, encoder.capacity)
    encoder.overflowed = packing.overflowed
    if packing.known_total == keep.numel():
        return _padded(encoder, None)
    return Batch(packing, masks.causal() if encoder.family.causal else None)


def _padded(encoder: Encoder, keep: Tensor | None) -> Batch:
    causal = masks.causal() if encoder.family.causal else None
    if keep is None:
        return Batch(None, causal)
    padding = masks.key_padding(keep)
    return Batch(None, padding if causal is None else padding & causal)


def _padding_stays(encoder: Encoder, keep: Tensor) -> str | None:
    """Why padding is not taken out of a call, or None."""
    if encoder.unpad == "never":
        return "unpad=never"
    if encoder.examined is not None and encoder.examined.hooked is not None:
        return encoder.examined.hooked
    if encoder.unpad == "always":
        return None
    readable = encoder.capacity is None and not traced(keep)
    return encoder.reader or keeps_padding(keep, encoder.reads_first, readable)


def _unpacked(outputs: Any, packing: Packing) -> Any:
    """With hidden states that were recorded between layers, (T, C), as (B, L, C)."""

    def unpack(states: tuple) -> tuple:
        return tuple(packing.unpack(x) if isinstance(x, Tensor) and x.dim() == 2 else x for x in states)

    if isinstance(outputs, tuple):
        return tuple(unpack(x) if isinstance(x, tuple) else x for x in outputs)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = unpack(outputs["hidden_states"])
    return outputs
