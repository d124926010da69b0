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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn.biases import Bias
from fastattn.integrations import accelerate_heads as heads
from fastattn.integrations.accelerate_checks import Examined, Found, look
from fastattn.integrations.accelerate_decoding import STATES, STATES_MASK, Kind, kind_of, not_decoded
from fastattn.integrations.accelerate_layers import NOTHING, Batch, Beside, beside, compute, plain, traced
from fastattn.integrations.accelerate_padding import batch_of, masked, packed, padded, padding_of, unpacked
from fastattn.integrations.accelerate_parts import Family, Parts
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
DECODING = (STATES, STATES_MASK, "is_decoder")
BEYOND = ("past_key_values", "encoder_embeds", "head_mask", *DECODING)
PADDING_ALONE = "only a padding mask (batch, length) is served, got"
NOTHING_FOUND = Found({}, None, None)
_lock = threading.RLock()  # held while an encoder is examined
_thread = threading.local()  # .handed: an Encoder and its Batch, where its model does not hand keyword arguments on


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
            self.settings.report.fell_back(
                self.settings, "nn.DataParallel runs copies of the model (DistributedDataParallel does not)"
            )
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

    def fell_back(self, what: Any, why: str) -> None:
        """Of what has a `name` and is `strict` or not: a call runs its own code. Raises NotImplementedError if it must not."""
        if what.strict:
            raise NotImplementedError(f"strict=True, but this call is not served: {why}")
        if why not in self.fallbacks and not torch.compiler.is_compiling():
            logger.warning("%s runs its own code: %s", what.name or "the accelerated model", why)
        self.fallbacks[why] += 1

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
    pools: bool  # whether it has a pooler that is given what the last of its layers gives, packed
    strict: bool  # as the arguments of `accelerate`
    capacity: int | None
    prove: bool
    unpad: str
    layers: list[Layer] = field(default_factory=list)
    ours: dict[nn.Module, Replaced] = field(default_factory=dict)
    examined: Examined | None = None
    found: Found = NOTHING_FOUND
    proven: set[Kind] = field(default_factory=set)  # of calls: those that need not compare any more
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
        self.proven, self.differs = set(), None
        for name in (self.name, *(self.path(layer.name) for layer in self.layers)):
            self.report.left.pop(name, None)

    def _take(self, found: Found) -> None:
        self.found = found
        for layer in self.layers:
            layer.parts, layer.weights = found.parts.get(layer.module), None
            layer.plain = layer.parts is not None and plain(self.family, layer.parts)
            layer.given = self.family.given

    def asks(self, kind: Kind) -> bool:
        """Whether the next call of a kind is to compare."""
        return self.prove and self.differs is None and kind not in self.proven

    @property
    def unproven(self) -> bool:
        return self.asks(Kind())

    def path(self, layer: str) -> str:
        return ".".join(part for part in (self.name, self.family.root, layer) if part)


@dataclass(eq=False)
class Layer:
    name: str
    module: nn.Module
    family: Family
    parts: Parts | None  # None: it must not be computed by us
    weights: Weights | None = None  # those of the parts
    plain: bool = False  # whether it is no more than what is launched on a GPU
    given: bool = False  # whether it is given something beside x

    def __getstate__(self) -> dict[str, Any]:
        """A copy has weights of its own."""
        return {**vars(self), "weights": None}

    def output(self, x: Tensor, batch: Batch, given: Beside = NOTHING) -> Tensor:
        """By the shortest way that serves it."""
        assert self.parts is not None
        if self.plain and given.memory is None and served(x):
            if self.weights is None:
                self.weights = Weights(self.parts)
            shortest = trained if torch.is_grad_enabled() else inferred
            y = shortest(self.family, self.parts, self.weights, x, batch)
            if y is not None:
                return y
        return compute(self.family, self.parts, x, batch, given)


# The replaced methods


def model_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    encoder, model = at.settings, at.module
    inputs = {**dict(zip(encoder.inputs, args, strict=False)), **kwargs}
    unchanged = encoder.graphs is not None and encoder.graphs.unchanged()
    why = encoder.refusal(model, unchanged) or _unserved(encoder, model, inputs)
    if why is not None:
        if encoder.graphs is not None:
            encoder.report.not_captured["the model's own code runs"] += 1
        encoder.report.fell_back(encoder, why)
        return at.own(*args, **kwargs)
    if encoder.graphs is not None:
        outputs = encoder.graphs.replayed(at, inputs, unchanged)
        if outputs is not None:
            return outputs
    mask = padding_of(encoder, inputs)
    keep = None if mask is None else mask.bool()
    batch = batch_of(encoder, model, inputs, keep)
    kind = kind_of(encoder.family, inputs)
    if encoder.asks(kind) and not any(traced(x) for x in inputs.values() if isinstance(x, Tensor)):
        batch = _with_proof(batch, keep)
    if batch.proof is None and mask is not None and not encoder.family.reads_mask:
        inputs.pop(encoder.family.mask, None)  # with a proof, the layers' own code needs the mask that the model makes
    outputs = _called(at, inputs, batch)
    if batch.proof is not None:
        _conclude(encoder, model, batch.proof, kind)
    return outputs if batch.packing is None else unpacked(outputs, batch.packing, encoder.family.encoder is None)


def _called(at: Replaced, inputs: dict[str, Any], batch: Batch) -> Any:
    """The model's own code, the batch handed on to its layers."""
    encoder = at.settings
    told = {KEYWORD: batch} if encoder.family.hands_on == "model" else {}
    if told and not encoder.pools:
        return at.own(**inputs, **told)
    before, _thread.handed = getattr(_thread, "handed", None), (encoder, batch)
    try:
        return at.own(**inputs, **told)
    finally:
        _thread.handed = before


def _handed(at: Replaced) -> Batch | None:
    """What the model around an encoder or a layer was called with."""
    encoder, batch = getattr(_thread, "handed", None) or (None, None)
    return batch if encoder is not None and encoder.ours.get(at.module) is at else None


def laid_out(at: Replaced, inputs: dict[str, Any], masked: bool, rows: int | None) -> tuple[Any, Tensor | None]:
    """A call of a model whose padding was decided about before, so that nothing is read: taken out to so many rows, or, where
    `rows` is None, left in, behind a mask or not. Its outputs, and whether tokens were dropped."""
    encoder, mask = at.settings, padding_of(at.settings, inputs)
    keep = None if mask is None else mask.bool()
    inputs = {name: x for name, x in inputs.items() if mask is None or name != encoder.family.mask}
    if rows is None or keep is None:
        return _called(at, inputs, padded(encoder, keep if masked else None)), None
    packing = Packing.from_mask(keep, rows)
    outputs = _called(at, inputs, packed(encoder, packing))
    return unpacked(outputs, packing, encoder.family.encoder is None), packing.overflowed


def encoder_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    family = at.settings.family
    if family.hands_on == "encoder":
        kwargs[KEYWORD] = _handed(at)
    batch = kwargs.get(KEYWORD) if family.hands_on != "nobody" else _handed(at)
    if batch is None:
        kwargs.pop(KEYWORD, None)
        return at.own(*args, **kwargs)
    if family.masked_at == "encoder":
        kwargs[KEYWORD] = masked(batch, args[1] if len(args) > 1 else kwargs.get("attention_mask"))
    packing = batch.packing
    if packing is None:
        return at.own(*args, **kwargs)
    if family.packs == "encoder":
        name = "hidden_states" if "hidden_states" in kwargs else "inputs_embeds"
        x = args[0] if args else kwargs.pop(name)
        args = (packing.pack(x), *args[1:])
    outputs = at.own(*args, **kwargs)
    return unpacked(outputs, packing, True)


def pooler_forward(at: Replaced, x: Tensor) -> Any:
    """Of a model in which nothing stands around the layers alone. x: what the last of them gives."""
    batch = _handed(at)
    return at.own(x if batch is None or batch.packing is None else batch.packing.unpack(x))


def layer_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    layer, batch = at.settings, kwargs.pop(KEYWORD, None)
    if layer.family.hands_on == "nobody":
        batch = _handed(at)
    if batch is None:
        return at.own(*args, **kwargs)
    x, rest, packing, family = args[0], args[1:], batch.packing, layer.family
    if packing is not None and x.dim() == 3:  # the first of those that pack
        x = packing.pack(x)
    module: Any = at.module
    given = beside(family, layer.parts, x, batch, kwargs) if layer.given else NOTHING
    if family.decodes:
        given = given._replace(memory=rest[0] if rest else kwargs.get(STATES))
    if family.hands_bias:
        return _hands_bias(at, batch, x, given, rest, kwargs)
    if batch.proof is None and not _checkpoints_in_forward(module):
        return _as_returned(family, layer.output(x, batch, given))

    def own(x: Tensor) -> Tensor:
        y = at.own(x if packing is None else packing.unpack(x), *rest, **kwargs)
        y = y[0] if family.tuples else y
        return y if packing is None else packing.pack(y)

    def ours(x: Tensor, memory: Tensor | None = given.memory) -> Tensor:  # an argument, so that a reentrant checkpoint sees it
        return layer.output(x, batch, given if memory is None else given._replace(memory=memory))

    if batch.proof is not None and not batch.proof.holds(layer.name, module, x, own, ours):
        return _as_returned(family, own(x))
    if not _checkpoints_in_forward(module):
        return _as_returned(family, ours(x))
    return _as_returned(family, module._gradient_checkpointing_func(ours, x, given.memory))


def _as_returned(family: Family, y: Tensor) -> Any:
    return (y,) if family.tuples else y


def _hands_bias(at: Replaced, batch: Batch, x: Tensor, own_bias: Beside, rest: tuple, kwargs: dict[str, Any]) -> tuple:
    """A layer of T5's. The first one makes a bias for each pair, which others are given; here it is a `biases.relative`, never
    (H, L, L). Where a layer of a decoder gives a bias of its cross attention, there is a None."""
    layer, packing, (mask, first, *others) = at.settings, batch.packing, rest
    given = Beside(first) if own_bias.bias is None else own_bias
    ours = functools.partial(layer.output, batch=batch, given=given)

    def own(x: Tensor) -> tuple[Tensor, Any, None]:
        x = x if packing is None else packing.unpack(x)
        bias = None if own_bias.bias is not None else given.bias
        bias = bias.dense(x.shape[1], x.shape[1]) if isinstance(bias, Bias) else bias
        y, made, _ = at.own(x, mask, bias, *others, **kwargs)
        return y if packing is None else packing.pack(y), made, None

    if batch.proof is not None and not batch.proof.holds(layer.name, at.module, x, lambda x: own(x)[0], ours):
        return own(x)
    return ours(x), given.bias, None


def head_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(at.module).forward).parameters)[1:]
    with heads.labels_inside({**dict(zip(names, args, strict=False)), **kwargs}):
        return at.own(*args, **kwargs)


# What they need


def _checkpointed(layer: Any) -> bool:
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def _checkpoints_in_forward(layer: Any) -> bool:
    """Whether gradient checkpointing is on, and is done by the `forward` that ours stands for.

    Older versions of transformers do it in the layer's `__call__`, around any forward.
    """
    if not _checkpointed(layer):
        return False
    return not any(c.__name__ == "GradientCheckpointingLayer" and "__call__" in vars(c) for c in type(layer).__mro__)


def _unserved(encoder: Encoder, model: Any, inputs: dict[str, Any]) -> str | None:
    """Why a call cannot be served, or None."""
    if inputs.get("use_cache"):
        return "use_cache=True"
    if inputs.get("output_attentions", model.config.output_attentions):
        return "output_attentions=True"
    for name in BEYOND:
        if inputs.get(name) is not None and inputs[name] is not False and not (encoder.family.decodes and name in DECODING):
            return f"{name} was given"
    for name, value in inputs.items():
        if value is not None and value is not False and name not in HARMLESS and name not in encoder.inputs:
            return f"{name} was given"
    family = encoder.family
    if family.clamps == "inside" and any(x.dtype == torch.float16 for x in model.parameters()):
        return "float16, in which T5's layers clamp what they give"
    if family.hands_on == "nobody" and any(_checkpointed(x.module) for x in encoder.layers):
        return "gradient checkpointing of layers that are not told what they belong to"
    mask = None if family.mask is None else inputs.get(family.mask)
    if mask is not None and family.pair_bias and family.masked_at == "model":
        return f"{family.mask} was given, beside a bias of positions"
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return f"{PADDING_ALONE} {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
        return f"{family.mask} {tuple(mask.shape)} is not of the tokens' shape"
    return not_decoded(encoder, model, inputs, tokens, mask) if family.decodes else None


def _with_proof(batch: Batch, keep: Tensor | None) -> Batch:
    """The batch with a proof that its layers are to give, if it can: with tokens that were dropped the model computes others."""
    if batch.packing is None:
        return batch._replace(proof=Proof(keep))
    return batch if bool(batch.packing.overflowed) else batch._replace(proof=Proof(batch.packing.live))


def _conclude(encoder: Encoder, model: nn.Module, proof: Proof, kind: Kind) -> None:
    if not proof.asked and not model.training:  # in training all layers may be dropped
        encoder.differs = encoder.report.left[encoder.name] = "its layers were not called as they are known to be"
        encoder.report.fell_back(encoder, encoder.differs)
        return
    if proof.difference is None and proof.compared >= len(encoder.layers):
        encoder.proven.add(kind)
    if proof.difference is not None:
        encoder.differs = tell(proof.difference)
        encoder.report.left[encoder.path(proof.difference[0])] = encoder.differs
        encoder.report.fell_back(encoder, encoder.differs)
