"""Layers that stand alone, for `accelerate`: of models that hand no padding on to them, or that are no lists of layers.

Such a block looks at itself in each call, and proves itself in its first one; where something is not as it is known, its own code
runs. What blocks compute is in files of their own: `accelerate_prenorm` (timm, open_clip), `accelerate_windows` (CLAP's audio
encoder, Donut's) and `accelerate_xlm`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastattn.integrations import accelerate_prenorm, accelerate_windows, accelerate_xlm
from fastattn.integrations.accelerate_checks import GLOBAL_HOOKS, HOOKS
from fastattn.integrations.accelerate_forward import Replaced, Report
from fastattn.integrations.accelerate_layers import traced
from fastattn.integrations.accelerate_parts import full_name, own_name
from fastattn.integrations.accelerate_prenorm import Seen
from fastattn.integrations.accelerate_proof import Proof, tell
from fastattn.kept import nothing_kept
from fastattn.planned import PLAIN


class Kind(Protocol):
    """A class of blocks, and what they compute."""

    @property
    def models(self) -> str: ...  # whose they are
    @property
    def does(self) -> str: ...  # what of it is ours
    @property
    def inputs(self) -> tuple[str, ...]: ...  # the arguments of its forward, x first
    @property
    def tupled(self) -> bool: ...  # it gives a tuple, its output alone

    def made_otherwise(self, block: Any) -> str | None:
        """Why a block cannot be computed from its weights, or None. Raises AttributeError where it lacks a part."""

    def unserved(self, block: Any, given: dict[str, Any], seen: Seen) -> str | None:
        """Why a call cannot be served, or None."""

    def computed(self, block: Any, x: Tensor, given: dict[str, Any], seen: Seen) -> Tensor:
        """What a block gives, (B, L, C) as x; given: the other arguments."""

    def proving(self, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments by which it is proven, which has to leave no trace, and the tokens that count, (B, L), or None: all."""


KINDS: dict[str, Kind] = {**accelerate_prenorm.KINDS, **accelerate_windows.KINDS, **accelerate_xlm.KINDS}
MODELS = ", ".join(dict.fromkeys(kind.models for kind in KINDS.values()))
# what `why_not` reads beside modules; other numbers are read where they are used
NUMBERS = ("approximate", "batch_first", "add_zero_attn", "_qkv_same_embed_dim", "act", "gate_last", "chunk_dim")
METHODS = ("attention", "ff_chunk")  # of blocks, which their forward calls


@dataclass
class Block:
    """What is known of one."""

    name: str
    kind: Kind
    report: Report
    strict: bool
    prove: bool
    graphs: bool
    seen: Seen
    noted: tuple = ()  # what the next three rest on
    refused: str | None = None
    differs: str | None = None
    unproven: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules, and proves itself."""
        return {**vars(self), "noted": ()}

    def forget(self) -> None:
        self.noted, self.seen.last = (), None

    def refusal(self, module: nn.Module) -> str | None:
        """Why its own code is to run, as it is now."""
        noted = _noted(module)
        if noted != self.noted:
            self.refused, self.unproven, self.differs = why_not(module, self.kind), self.prove, None
            self.noted = noted
            self.report.left.pop(self.name, None)
        return self.refused or self.differs


def kind_of(module: nn.Module) -> Kind | None:
    """Also of classes that derive from a known one, which are then refused by name."""
    return next((KINDS[name] for cls in type(module).__mro__ if (name := full_name(cls)) in KINDS), None)


def accelerate_block(handle: Any, name: str, module: nn.Module, capacity: int | None, **settings: Any) -> None:
    """One block inside a model; or its line in `report.left`."""
    kind = kind_of(module)
    assert kind is not None
    why = f"capacity is not served of {kind.models}" if capacity is not None else why_not(module, kind)
    if why is None and "forward" in vars(module):
        why = "a forward was set on it"
    if why is not None:
        handle.report.left[name] = why
        return
    seen = handle._blocks[0].seen if handle._blocks else Seen()
    handle._blocks.append(Block(name, kind, handle.report, seen=seen, **settings))
    handle._replace(module, block_forward, handle._blocks[-1])
    around = name.rpartition(".")[0]
    count = sum(block.name.rpartition(".")[0] == around for block in handle._blocks)
    handle.report.accelerated[around] = f"{type(module).__name__}, {count} layer{'s' * (count > 1)}: {kind.does}"


def block_forward(at: Replaced, *args: Any, **kwargs: Any) -> Any:
    block, module = at.settings, at.module
    kind = block.kind
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():  # which would have to trace how a block is looked at
        return at.own(*args, **kwargs)
    if block.graphs:
        block.report.not_captured["blocks that stand alone are not captured"] += 1
    given = {**dict(zip(kind.inputs, args, strict=False)), **kwargs}
    why = block.refusal(module) or _unserved(block, module, len(args), given)
    if why is not None:
        block.report.fell_back(block, why)
        return at.own(*args, **kwargs)
    x = given.pop(kind.inputs[0])
    if block.unproven and not traced(x):
        _prove(at, x, given)
        if block.differs is not None:
            block.report.fell_back(block, block.differs)
            return at.own(*args, **kwargs)
    kept = contextlib.nullcontext() if torch.is_grad_enabled() or not module.training or traced(x) else nothing_kept()
    with kept:
        y = kind.computed(module, x, given, block.seen)
    return (y,) if kind.tupled else y


def _prove(at: Replaced, x: Tensor, given: dict[str, Any]) -> None:
    block, module = at.settings, at.module
    quiet, real = block.kind.proving(given)
    proof = Proof(real)

    def own(x: Tensor) -> Tensor:
        y = at.own(x, **quiet)
        return y[0] if block.kind.tupled else y

    if proof.holds(block.name, module, x, own, lambda x: block.kind.computed(module, x, quiet, block.seen)):
        block.unproven = proof.compared == 0
        return
    assert proof.difference is not None
    block.differs = block.report.left[block.name] = tell(proof.difference)


def _unserved(block: Block, module: nn.Module, count: int, given: dict[str, Any]) -> str | None:
    """Why a call cannot be served, or None."""
    kind = block.kind
    x = given.get(kind.inputs[0])
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or count > len(kind.inputs) or not set(given) <= set(kind.inputs):
        return "it was not called with a plain tensor (batch, length, features) and the arguments that are known"
    return kind.unserved(module, given, block.seen)


# Whether a block is what it seems


def _noted(module: nn.Module) -> tuple:
    """Modules by identity, with all that `why_not` reads, and how many attributes they have: a method that is set on one is one
    more. The block's own hooks and `forward` stand around what is computed."""
    found: list[Any] = [len(hooks) for hooks in GLOBAL_HOOKS] + [getattr(type(module), name, None) for name in METHODS]
    for part in module.modules():
        here = vars(part)
        own = None if part is module else here.get("forward")
        hooked = () if part is module else [len(here[hooks]) for hooks in HOOKS]
        numbers = [here.get(name) for name in NUMBERS]
        found += (part, type(part), type(part).forward, len(here), own, *hooked, *numbers, *map(type, part._parameters.values()))
    return tuple(found)


def why_not(block: nn.Module, kind: Kind) -> str | None:
    """Why a block cannot be computed from its weights, or None."""
    if any(GLOBAL_HOOKS):
        return "there are hooks on every module, which would not run"
    if own_name(block) not in KINDS:
        return f"{type(block).__name__} is no class that is known, or its forward was replaced: it may compute anything"
    for name, part in block.named_modules():
        if part is not block and ("forward" in vars(part) or any(getattr(part, hooks) for hooks in HOOKS)):
            return f"{name} has hooks, or a forward that was set, which would not run"
        if any(p is not None and type(p) not in PLAIN for p in part._parameters.values()) and not torch.compiler.is_compiling():
            return f"{name or 'it'} has parameters that are no plain tensors"
    for name in METHODS:
        method = getattr(type(block), name, None)
        if name in vars(block) or getattr(method, "__module__", type(block).__module__) != type(block).__module__:
            return f"its method {name} was replaced"
    try:
        return kind.made_otherwise(block)
    except AttributeError as error:
        return f"a {type(block).__name__} is made otherwise: {error}"
