"""`accelerate(model)`: a Hugging Face encoder, in place and reversibly, on fastattn's ops and without its padding.

Three kinds of module get a `forward` of their own, on the instance alone; classes, parameters and state_dict stay as they are.
- The model reads the padding mask and makes a `Batch` of it, which travels as a keyword argument through transformers' own code.
- The encoder lays the real tokens end to end at its entrance, (B, L, C) -> (T, C), and puts them back at its exit.
- A layer that is given a Batch computes with fused ops; without one it does what it always did.
`accelerate_layers` says which classes there are and how their layers are made up.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations.accelerate_layers import FAMILIES, Batch, Family, Layer, Parts, compute, family_of, traced
from fastattn.kernels.cpu.ffn import clear_packed
from fastattn.masks import Mask
from fastattn.packing import Packing

KEYWORD = "fastattn_batch"
PADDING_ALONE = "only a padding mask (batch, length) is served, got"


class Replaced:
    """What stands as `forward` on a module: `function(module, settings, *args, **kwargs)`.

    An object rather than a bound method, so that a copied or unpickled module has one that belongs to it.
    """

    def __init__(self, function: Callable, module: nn.Module, settings: Any) -> None:
        self.function, self.module, self.settings = function, module, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, self.settings, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The replaced method's: trainers look at it for the names of a model's inputs."""
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])


@dataclass
class Report:
    """What was done to a model. `str()` of it is for reading."""

    accelerated: dict[str, str] = field(default_factory=dict)  # module -> what is done there
    left: dict[str, str] = field(default_factory=dict)  # module -> why it is as it was
    fallbacks: Counter[str] = field(default_factory=Counter)  # why calls ran the model's own code, and how many

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {what}" for name, what in self.accelerated.items()]
        lines += [f"{name or 'model'}: left as it was: {why}" for name, why in self.left.items()]
        return "\n".join(lines + [f"{count} calls ran the model's own code: {why}" for why, count in self.fallbacks.items()])


@dataclass
class Settings:
    """Of one encoder."""

    family: Family
    names: list[str]  # of the model's inputs
    layers: list[Layer]
    report: Report
    strict: bool
    capacity: int | None
    overflowed: Tensor | None = None  # of the last packed call


class Handle:
    """Undoes `accelerate`; as a context manager at the end of the block."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._replaced: list[nn.Module] = []

    @property
    def overflowed(self) -> bool:
        """Whether an encoder had more real tokens than `capacity` in its last call, and some were dropped. Waits for a GPU."""
        found = (vars(module)["forward"].settings for module in self._replaced)
        return any(bool(x.overflowed) for x in found if isinstance(x, Settings) and x.overflowed is not None)

    def restore(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        for module in self._replaced:
            vars(module).pop("forward", None)
        self._replaced.clear()
        clear_packed()

    def refresh(self) -> None:
        """Forget the copies of weights that were made for inference.

        Assignments, optimizers and load_state_dict are noticed without it; writes through `.data` or numpy are not.
        """
        for module in self._replaced:
            settings = vars(module)["forward"].settings
            if isinstance(settings, Layer):
                settings.forget()
        clear_packed()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _replace(self, module: nn.Module, function: Callable, settings: Any) -> None:
        module.forward = Replaced(function, module, settings)
        self._replaced.append(module)


def accelerate(model: nn.Module, strict: bool = False, *, capacity: int | None = None) -> Handle:
    """Let the encoders inside `model` compute real tokens alone, with fused attention, FFN and add + LayerNorm.

    Serves transformers' BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, CLIP (text, vision, both) and ViT: alone,
    with any head on top, or inside another module such as a SentenceTransformer. Outputs at real tokens, hidden states and
    gradients are those of the model, up to rounding; hidden states at padding are 0, and so is what a pooler takes from there
    (the first token of a sequence that is padded on the left). Only the given model is changed.

    Args:
        model: any module; what is not served in it is left as it is and named in the report.
        strict: raise where something would be left, and where a call would have to run the model's own code.
        capacity: rows of packed batches, for static shapes: with it nothing is read on the host, so that a call can be traced by
            torch.compile or captured in a CUDA graph without padding. Tokens beyond it are dropped, and `overflowed` says so.
            None: as many as there are; a traced or captured call then keeps its padding.

    Returns:
        A handle with `report`, `overflowed`, `restore()` and `refresh()`, which is a context manager too.

    Raises:
        ValueError: the model is accelerated already, or `strict` and there is nothing that is served.
        NotImplementedError: `strict` and a part of it would be left.

    A call that asks for attention weights or a cache, passes a mask other than padding, or trains with attention dropout runs the
    model's own code, and `report.fallbacks` counts it.
    """
    report = Report()
    handle = Handle(report)
    for name, module in _encoders(model):
        if any(isinstance(vars(part).get("forward"), Replaced) for part in module.modules()):
            raise ValueError(f"{name or 'the model'} is accelerated already: call restore() first")
    for name, module in _encoders(model):
        family = family_of(module)
        assert family is not None
        layers = family.layers_of(module)
        refusal = next((parts for layer in layers if isinstance(parts := family.parts(layer), str)), None)
        if refusal is not None:
            report.left[name] = refusal
            continue
        inputs = list(inspect.signature(module.forward).parameters)
        settings = Settings(family, inputs, [Layer(index) for index in range(len(layers))], report, strict, capacity)
        handle._replace(module, _model_forward, settings)
        if family.encoder is not None:
            handle._replace(getattr(module, family.encoder), _encoder_forward, settings)
        for layer, known in zip(layers, settings.layers, strict=True):
            handle._replace(layer, _layer_forward, known)
        padding = "real tokens alone, " if family.encoder is not None else ""
        report.accelerated[name] = f"{type(module).__name__}, {len(layers)} layers: {padding}fused attention, FFN and norms"
    if strict and (report.left or not report.accelerated):
        handle.restore()
        why = "; ".join(f"{name or 'model'}: {reason}" for name, reason in report.left.items())
        if not why:
            raise ValueError(f"model has no encoder that is served: one of {', '.join(FAMILIES)}")
        raise NotImplementedError(f"strict=True, but not all of the model is served: {why}")
    if not report.accelerated and not report.left:
        report.left[""] = f"no encoder that is served: one of {', '.join(FAMILIES)}"
    return handle


def _encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if family_of(module) is not None)


# The three replaced methods


def _model_forward(model: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    own = type(model).forward
    inputs = {**dict(zip(settings.names, args, strict=False)), **kwargs}
    parts = [settings.family.parts(layer) for layer in settings.family.layers_of(model)]
    why = _unserved(model, inputs, parts)
    if why is not None:
        if settings.strict:
            raise NotImplementedError(f"strict=True, but this call is not served: {why}")
        settings.report.fallbacks[why] += 1
        return own(model, *args, **kwargs)
    packing, mask = _tokens(settings, inputs.pop("attention_mask", None))
    batch = Batch(packing, mask, cast(list[Parts], parts), settings.family.pre_norm)
    outputs = own(model, **inputs, **{KEYWORD: batch})
    return outputs if packing is None else _unpacked(outputs, packing)


def _encoder_forward(encoder: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    own, batch = type(encoder).forward, kwargs.get(KEYWORD)
    if batch is None or batch.packing is None:
        return own(encoder, *args, **kwargs)
    states, rest = args[:1], args[1:]
    name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
    x = states[0] if states else kwargs.pop(name)
    outputs = own(encoder, batch.packing.pack(x), *rest, **kwargs)
    outputs.last_hidden_state = batch.packing.unpack(outputs.last_hidden_state)
    return outputs


def _layer_forward(module: nn.Module, layer: Layer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    batch = kwargs.get(KEYWORD)
    if batch is None:
        return type(module).forward(module, x, *args, **kwargs)
    return compute(layer, x, batch, module.training)


def _unserved(model: Any, inputs: dict[str, Any], parts: list[Parts | str]) -> str | None:
    """Why a call cannot be served, or None."""
    for found in parts:
        if isinstance(found, str):
            return found
        if model.training and found.attention_dropout > 0:
            return "attention dropout in training"
    for name in ("output_attentions", "use_cache"):
        if inputs.get(name) or (name == "output_attentions" and inputs.get(name, model.config.output_attentions)):
            return f"{name}=True"
    for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask", "head_mask"):
        if inputs.get(name) is not None:
            return f"{name} was given"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return f"{PADDING_ALONE} {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
    return None


def _tokens(settings: Settings, mask: Tensor | None) -> tuple[Packing | None, Mask | None]:
    """Where the tokens of a call lie if padding is taken out, and what hides them from one another."""
    causal = masks.causal() if settings.family.causal else None
    if mask is None:
        return None, causal
    keep = mask.bool()
    if settings.family.encoder is not None and (settings.capacity is not None or not traced(keep)):
        packing = Packing.from_mask(keep, settings.capacity)
        settings.overflowed = packing.overflowed
        return (None if packing.known_total == keep.numel() else packing), causal
    padding = masks.key_padding(keep)
    return None, padding if causal is None else padding & causal


def _unpacked(outputs: Any, packing: Packing) -> Any:
    """With hidden states that were recorded between layers, (T, C), as (B, L, C)."""

    def unpack(states: tuple) -> tuple:
        return tuple(packing.unpack(x) if isinstance(x, Tensor) and x.dim() == 2 else x for x in states)

    if isinstance(outputs, tuple):
        return tuple(unpack(x) if isinstance(x, tuple) else x for x in outputs)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = unpack(outputs["hidden_states"])
    return outputs
