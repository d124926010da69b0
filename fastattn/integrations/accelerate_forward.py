"""What stands as `forward` on the modules of an accelerated model, and what it decides in each call.

- The model's reads the padding mask and makes a `Batch` of it, which travels through transformers' code as a keyword argument.
- The encoder's lays the real tokens end to end at its entrance, (B, L, C) -> (T, C), and puts them back at its exit.
- A layer's, given a Batch, computes with fused ops; without one it does what it always did.
- A head's, which takes labels, lets the encoders inside see them: where padding has a label, padding stays in.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations import accelerate_heads as heads
from fastattn.integrations import accelerate_t5
from fastattn.integrations.accelerate_checks import Examined, Found, look
from fastattn.integrations.accelerate_layers import Batch, Family, Parts, compute, traced
from fastattn.integrations.accelerate_plans import Weights, inferred, served
from fastattn.integrations.accelerate_proof import Proof, tell
from fastattn.integrations.accelerate_training import trained
from fastattn.integrations.keywords import HARMLESS
from fastattn.packing import Packing

if TYPE_CHECKING:
    from fastattn.integrations.accelerate_graphs import EncoderGraphs

logger = logging.getLogger("fastattn")
KEYWORD = "fastattn_batch"
REPLICATE = "_replicate_for_data_parallel"
PADDING_ALONE = "only a padding mask (batch, length) is served, got"
NOTHING_FOUND = Found({}, None, None)
_lock = threading.RLock()  # held while an encoder is examined


class Replaced:
    """What stands as `forward` on a module: `function(replaced, *args, **kwargs)`, until `undo`.

    An object rather than a bound method, so that a copied or unpickled module has one that belongs to it.
    """

    def __init__(self, function: Callable, module: nn.Module, settings: Any) -> None:
        self.function, self.module, self.settings = function, module, settings
        self.before = vars(module).get("forward")
        self.active, self.copied = True, False
        module.forward = self
        vars(module)[REPLICATE] = self.replica

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copied": True}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # a library took this for a function, and has bound it to the module once more
            args = args[1:]
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

    def replica(self) -> nn.Module:
        """nn.DataParallel's copy of the module, with weights on another device: it runs its own code."""
        replica = getattr(type(self.module), REPLICATE)(self.module)
        for name in ("forward", REPLICATE):
            vars(replica).pop(name, None)
        if isinstance(self.settings, Encoder):
            _tell_fallback(self.settings, "nn.DataParallel runs copies of the model (DistributedDataParallel does not)")
        return replica

    def undo(self) -> None:
        """Where another library has wrapped this since, its wrapper stays, around the module's own forward."""
        self.active = False
        vars(self.module).pop(REPLICATE, None)
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
    not_captured: Counter[str] = field(default_factory=Counter)  # with cuda_graphs: why calls ran without, and how many

    def __str__(self) -> str:
        named = ((self.accelerated, ""), (self.left, "left as it was: "), (self.foreseen, "to come: "))
        lines = [f"{name or 'model'}: {kind}{what}" for found, kind in named for name, what in found.items()]
        lines += [f"{count} calls ran the model's own code: {why}" for why, count in self.fallbacks.items()]
        lines += [f"{count} calls kept their padding: {why}" for why, count in self.padded.items()]
        return "\n".join(lines + [f"{count} calls ran without a CUDA graph: {why}" for why, count in self.not_captured.items()])


@dataclass
class Encoder:
    """What is known of one, and how it is to be computed."""

    family: Family
    name: str
    inputs: list[str]  # names of the model's arguments
    report: Report
    reader: str | None  # why padding is always read, or None
    pooled: bool  # whether one token of each sequence is read, padding or not
    strict: bool  # as the arguments of `accelerate`
    capacity: int | None
    prove: bool
    unpad: str
    layers: list[Layer] = field(default_factory=list)
    ours: dict[nn.Module, Replaced] = field(default_factory=dict)
    examined: Examined | None = None
    found: Found = NOTHING_FOUND
    unproven: bool = False  # the next call is to compare
    differs: str | None = None  # what a proof found
    overflowed: Tensor | None = None  # of the last packed call
    graphs: EncoderGraphs | None = None  # with cuda_graphs

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and proves itself."""
        return {**vars(self), "examined": None}

    def refusal(self, model: nn.Module, unchanged: bool = False) -> str | None:
        """Why the layers are not computed by us, as they are now; what has changed is examined, and has to prove itself.

        unchanged: that graphs have found all as it was in inference, which `holds` asks no more than.
        """
        if torch.compiler.is_dynamo_compiling():  # a graph is guarded by all that is looked at
            found = look(model, self.family, self.ours)
            self._take(found)
            return found.refusal or self.differs
        known = unchanged and not torch.is_grad_enabled()  # with hooks of a backward pass they have nothing to do
        if self.examined is None or not (known or self.examined.holds()):
            with _lock:
                self.examine(model)
        return self.found.refusal or self.differs

    def examine(self, model: nn.Module) -> None:
        self.examined = Examined(model, self.family, dict(self.ours))
        self._take(self.examined.found)
        if self.graphs is not None:
            self.graphs.calls.doubt()
        self.unproven, self.differs = self.prove, None
        for layer in self.layers:
            self.report.left.pop(self.path(layer.name), None)

    def _take(self, found: Found) -> None:
        self.found = found
        for layer in self.layers:
            layer.parts, layer.weights = found.parts.get(layer.module), None

    def path(self, layer: str) -> str:
        return ".".join(part for part in (self.name, self.family.layers, layer) if part)


@dataclass(eq=False)
class Layer:
    name: str
    module: nn.Module
    family: Family
    parts: Parts | None  # None: it must not be computed by us
    weights: Weights | None = None  # those of the parts

    def __getstate__(self) -> dict[str, Any]:
        """A copy has weights of its own."""
        return {**vars(self), "weights": None}

    def output(self, x: Tensor, batch: Batch) -> Tensor:
        """By the shortest way that serves it."""
        assert self.parts is not None
        if served(x):
            if self.weights is None:
                self.weights = Weights(self.parts)
            shortest = trained if torch.is_grad_enabled() else inferred
            y = shortest(self.family, self.parts, self.weights, x, batch)
            if y is not None:
                return y
        return compute(self.family, self.parts, x, batch)


# The replaced methods


def model_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    encoder, model = at.settings, at.module
    inputs = {**dict(zip(encoder.inputs, args, strict=False)), **kwargs}
    unchanged = encoder.graphs is not None and encoder.graphs.unchanged()
    why = encoder.refusal(model, unchanged) or _unserved(encoder, model, inputs)
    if why is not None:
        if encoder.graphs is not None:
            encoder.report.not_captured["the model's own code runs"] += 1
        _tell_fallback(encoder, why)
        return at.own(*args, **kwargs)
    if encoder.graphs is not None:
        outputs = encoder.graphs.replayed(at, inputs, unchanged)
        if outputs is not None:
            return outputs
    mask = inputs.get("attention_mask")
    keep = None if mask is None else mask.bool()
    batch = _batch(encoder, model, inputs, keep)
    if encoder.unproven and not any(traced(x) for x in inputs.values() if isinstance(x, Tensor)):
        batch = _with_proof(batch, keep)
    if batch.proof is None:  # else the layers' own code needs the mask that the model makes
        inputs.pop("attention_mask", None)
    outputs = at.own(**inputs, **{KEYWORD: batch})
    if batch.proof is not None:
        _conclude(encoder, batch.proof)
    return outputs if batch.packing is None else _unpacked(outputs, batch.packing, encoder.family.relative)


def laid_out(at: Replaced, inputs: dict[str, Any], masked: bool, rows: int | None) -> tuple[Any, Tensor | None]:
    """A call of a model whose padding was decided about before, so that nothing is read: taken out to so many rows, or, where
    `rows` is None, left in, behind a mask or not. Its outputs, and whether tokens were dropped."""
    encoder, mask = at.settings, inputs.get("attention_mask")
    keep = None if mask is None else mask.bool()
    inputs = {name: x for name, x in inputs.items() if name != "attention_mask"}
    if rows is None or keep is None:
        return at.own(**inputs, **{KEYWORD: _padded(encoder, keep if masked else None)}), None
    packing = Packing.from_mask(keep, rows)
    outputs = at.own(**inputs, **{KEYWORD: _packed(encoder, packing)})
    return _unpacked(outputs, packing, encoder.family.relative), packing.overflowed


def encoder_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    batch = kwargs.get(KEYWORD)
    if batch is None or batch.packing is None:
        return at.own(*args, **kwargs)
    states, rest = args[:1], args[1:]
    name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
    x = states[0] if states else kwargs.pop(name)
    outputs = at.own(batch.packing.pack(x), *rest, **kwargs)
    outputs.last_hidden_state = batch.packing.unpack(outputs.last_hidden_state)
    return outputs


def layer_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    layer, batch = at.settings, kwargs.pop(KEYWORD, None)
    if batch is None:
        return at.own(*args, **kwargs)
    if layer.family.relative:
        return _relative_forward(at, batch, args[0], args[1:], kwargs)
    module: Any = at.module
    if batch.proof is None and not _checkpoints_in_forward(module):
        return layer.output(args[0], batch)
    x, rest = args[0], args[1:]

    def own(x: Tensor) -> Tensor:
        if batch.packing is None:
            return at.own(x, *rest, **kwargs)
        return batch.packing.pack(at.own(batch.packing.unpack(x), *rest, **kwargs))

    ours = functools.partial(layer.output, batch=batch)
    if batch.proof is not None and not batch.proof.holds(layer.name, module, x, own, ours):
        return own(x)
    return module._gradient_checkpointing_func(ours, x) if _checkpoints_in_forward(module) else ours(x)


def _relative_forward(at: Replaced, batch: Batch, x: Tensor, rest: tuple, kwargs: dict[str, Any]) -> tuple:
    """A layer of T5's, which is given and gives a bias beside x; without cross attention there is a None for that."""
    layer, packing, (mask, given, *others) = at.settings, batch.packing, rest
    if packing is not None and x.dim() == 3:
        x = packing.pack(x)
    bias = accelerate_t5.bias_of(layer.parts, given)
    ours = functools.partial(accelerate_t5.compute, layer.family, layer.parts, batch=batch, bias=bias)

    def own(x: Tensor) -> tuple[Tensor, Tensor, None]:
        x = x if packing is None else packing.unpack(x)
        y, made, _ = at.own(x, mask, accelerate_t5.own_bias(layer.parts, bias, x.shape[1]), *others, **kwargs)
        return y if packing is None else packing.pack(y), made, None

    if batch.proof is not None and not batch.proof.holds(layer.name, at.module, x, lambda x: own(x)[0], ours):
        return own(x)
    return ours(x), bias, None


def head_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(at.module).forward).parameters)[1:]
    with heads.labels_inside({**dict(zip(names, args, strict=False)), **kwargs}):
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
    if encoder.family.relative and any(x.dtype == torch.float16 for x in model.parameters()):
        return "float16, in which T5's layers clamp what they give"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return f"{PADDING_ALONE} {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
        return f"attention_mask {tuple(mask.shape)} is not of the tokens' shape"
    return None


def _with_proof(batch: Batch, keep: Tensor | None) -> Batch:
    """The batch with a proof that its layers are to give, if it can: with tokens that were dropped the model computes others."""
    if batch.packing is None:
        return batch._replace(proof=Proof(keep))
    return batch if bool(batch.packing.overflowed) else batch._replace(proof=Proof(batch.packing.live))


def _conclude(encoder: Encoder, proof: Proof) -> None:
    encoder.unproven = proof.difference is None and proof.compared < len(encoder.layers)
    if proof.difference is not None:
        encoder.differs = tell(proof.difference)
        encoder.report.left[encoder.path(proof.difference[0])] = encoder.differs
        _tell_fallback(encoder, encoder.differs)


def _batch(encoder: Encoder, model: nn.Module, inputs: dict[str, Any], keep: Tensor | None) -> Batch:
    """How the tokens of a call lie, and what hides them from one another."""
    if keep is None or not encoder.family.unpads:
        return _padded(encoder, keep)
    stays = _padding_stays(encoder, model, inputs, keep)
    if stays is not None:
        encoder.report.padded[stays] += 1
        return _padded(encoder, keep)
    if encoder.capacity is None and traced(keep):
        return _padded(encoder, keep)
    packing = Packing.from_mask(keep, encoder.capacity)
    encoder.overflowed = packing.overflowed
    if packing.known_total == keep.numel():
        return _padded(encoder, None)
    return _packed(encoder, packing)


def _packed(encoder: Encoder, packing: Packing) -> Batch:
    return Batch(packing, masks.causal() if encoder.family.causal else None, {})


def _padded(encoder: Encoder, keep: Tensor | None) -> Batch:
    causal = masks.causal() if encoder.family.causal else None
    if keep is None:
        return Batch(None, causal, {})
    padding = masks.key_padding(keep)
    return Batch(None, padding if causal is None else padding & causal, {})


def _padding_stays(encoder: Encoder, model: Any, inputs: dict[str, Any], keep: Tensor) -> str | None:
    """Why padding is not taken out of a call, or None."""
    why = padding_stays_unread(encoder, model, inputs, keep)
    if why is not None or traced(keep):
        return why
    return next((why for why, holds in questions(encoder, model, inputs, keep) if bool(holds)), None)


def padding_stays_unread(encoder: Encoder, model: Any, inputs: dict[str, Any], keep: Tensor) -> str | None:
    """As far as it is known without reading a value."""
    if encoder.unpad == "never":
        return "unpad=never"
    if encoder.found.hooked is not None:
        return encoder.found.hooked
    if encoder.unpad == "always":
        return None
    if encoder.reader is not None:
        return encoder.reader
    if torch.is_grad_enabled() and inputs.get("output_hidden_states", model.config.output_hidden_states):
        return "hidden states that may be asked for their gradients"  # copies of them are not on the way to a loss
    if encoder.capacity is not None or traced(keep):
        if encoder.family.relative:
            return "holes in a mask, over which distances count, are not looked for with a capacity"
        return heads.labels_for_each_token(keep)
    return None


def questions(encoder: Encoder, model: Any, inputs: dict[str, Any], keep: Tensor) -> Iterator[heads.Question]:
    """The rest, as what there is to read."""
    if encoder.capacity is not None or encoder.unpad == "always":
        return
    yield from heads.labels_at_padding(keep)
    if encoder.family.relative:
        yield heads.holes(keep)
    elif encoder.pooled:
        yield heads.pooled_padding(model, inputs, keep)


def _unpacked(outputs: Any, packing: Packing, last: bool) -> Any:
    """With hidden states that were recorded between layers, (T, C), as (B, L, C), and the last one too."""

    def unpack(states: tuple) -> tuple:
        return tuple(packing.unpack(x) if isinstance(x, Tensor) and x.dim() == 2 else x for x in states)

    if isinstance(outputs, tuple):
        outputs = tuple(unpack(x) if isinstance(x, tuple) else x for x in outputs)
        return (*unpack(outputs[:1]), *outputs[1:]) if last else outputs
    if last:
        outputs["last_hidden_state"] = packing.unpack(outputs["last_hidden_state"])
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = unpack(outputs["hidden_states"])
    return outputs
