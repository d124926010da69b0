"""torch.nn.TransformerEncoder for `accelerate`: its forward becomes that of a `fastattn.nn.Encoder` with the very same parts.

The twin holds the old modules themselves, and of attention their dicts of parameters: whatever becomes of a weight, it sees it.
What it was made from is compared in each call; what has changed makes a new twin, which has to prove itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastattn.integrations.accelerate_checks import GLOBAL_HOOKS, HOOKS
from fastattn.integrations.accelerate_forward import Replaced, Report
from fastattn.integrations.accelerate_layers import traced
from fastattn.integrations.accelerate_proof import Proof, as_in_evaluation, tell
from fastattn.nn.convert import METHODS, convert_encoder, why_not
from fastattn.nn.encoder import Encoder
from fastattn.nn.masking import causal_by_looks, real_tokens

READ = "what stands at padding may be read: unpad='always' is your word that it is not"
NAMES = "src", "mask", "src_key_padding_mask", "is_causal"
NUMBERS = "dropout", "num_heads", "batch_first", "norm_first", "activation", "add_zero_attn"  # of a layer and its attention


@dataclass
class Stack:
    """What is known of one torch.nn.TransformerEncoder."""

    name: str
    report: Report
    strict: bool
    prove: bool
    unpad: str
    graphs: bool
    twin: Encoder | None = None
    noted: tuple = ()  # what the twin was made from
    unproven: bool = False
    differs: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a twin of its own modules."""
        return {**vars(self), "twin": None, "noted": ()}

    def refusal(self, module: nn.TransformerEncoder) -> str | None:
        """Why its own code is to run; afterwards the twin is one of the module as it is now."""
        noted = _noted(module)
        if self.twin is None or noted != self.noted:
            why = refused(module)
            if why is not None:
                self.twin = None
                return why
            self.twin, self.noted, self.unproven, self.differs = twin_of(module), noted, self.prove, None
            self.report.left.pop(self.name, None)
        for ours, theirs in zip(self.twin.layers, module.layers, strict=True):
            ours.training = theirs.training
            ours.self_attn.training = theirs.self_attn.training  # type: ignore[union-attr]
        return self.differs


def accelerate_stack(handle: Any, name: str, module: nn.TransformerEncoder, capacity: int | None, **settings: Any) -> None:
    """One of them inside a model; or its line in `report.left`."""
    why = "capacity is not served of torch.nn.TransformerEncoder" if capacity is not None else refused(module)
    if why is not None:
        handle.report.left[name] = why
        return
    stack = Stack(name, handle.report, **settings)
    handle._replace(module, stack_forward, stack)
    handle._stacks.append(stack)
    what = {"auto": "padding taken out where torch.nn does", "always": "real tokens alone", "never": "padding stays in"}
    text = f"TransformerEncoder, {len(module.layers)} layers: {what[stack.unpad]}, fused attention, FFN and norms"
    handle.report.accelerated[name] = text


def stack_forward(at: Replaced, *args: Any, **kwargs: Any) -> Tensor:
    stack, module = at.settings, cast(Any, at.module)
    if torch.compiler.is_dynamo_compiling():  # which would have to trace how a twin is made
        return at.own(*args, **kwargs)
    if stack.graphs:
        stack.report.not_captured["torch.nn.TransformerEncoder is not captured"] += 1
    given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    why = stack.refusal(module) or _unserved(args, given)
    if why is None and stack.unproven and not traced(given["src"]):
        why = _proven(stack, module, **given)
    if why is not None:
        stack.report.fell_back(stack, why)
        return at.own(*args, **kwargs)
    request = [given.get(name) for name in NAMES]
    out = stack.twin.computed(*request, unpad=_unpads(stack, module, **given))
    return out if module.norm is None else module.norm(out)  # at padding as well, as torch.nn does


def _unserved(args: tuple, given: dict[str, Any]) -> str | None:
    src = given.get("src")
    if not isinstance(src, Tensor) or src.is_nested or len(args) > len(NAMES) or not {*given} <= {*NAMES}:
        return "it was not called with a plain tensor and torch.nn's arguments"
    if torch.is_autocast_enabled("cpu") and not src.is_cuda and not torch.is_grad_enabled():
        return "autocast on a CPU, in which torch.nn's fast path has another dtype than its own code"
    return None


def _unpads(stack: Stack, module: Any, src: Tensor, mask=None, src_key_padding_mask=None, is_causal=None) -> bool:
    """Where torch.nn would take padding out itself, so that what stands there is equal; and where it is said not to matter."""
    if src_key_padding_mask is None or stack.unpad == "never" or traced(src):
        return False
    if stack.unpad == "always":
        return True
    if mask is None and src.dim() == 3 and _takes_fast_path(module):
        keep = real_tokens(src_key_padding_mask)
        if keep is not None and bool((keep[:, 1:] <= keep[:, :-1]).all()):
            return True
    stack.report.padded[READ] += 1
    return False


def _takes_fast_path(module: Any) -> bool:
    """As far as it is torch.nn's own question; where it does, what stands at padding becomes 0."""
    if not torch.backends.mha.get_fastpath_enabled() or not module.use_nested_tensor or torch.is_autocast_enabled():
        return False
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in module.layers[0].parameters())
    return not module.layers[0].training and not wanted


def _proven(stack: Stack, module: Any, src: Tensor, mask=None, src_key_padding_mask=None, is_causal=None) -> str | None:
    """Each layer computed both ways on this call's input, padding left in. What differs, or None."""
    keep = None if src_key_padding_mask is None else real_tokens(src_key_padding_mask)
    keep = keep if keep is None or module.layers[0].self_attn.batch_first or src.dim() == 2 else keep.T
    causal, proof, x = causal_by_looks(mask, is_causal), Proof(keep), src
    for n, (theirs, ours) in enumerate(zip(module.layers, stack.twin.layers, strict=True)):  # type: ignore[union-attr]
        rest = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": causal}

        def own(x: Tensor, layer=theirs, rest=rest) -> Tensor:
            return layer(x, **rest)

        def twin(x: Tensor, layer=ours, rest=rest) -> Tensor:
            for part in layer.modules():  # those of the twin's own, as `Proof` has set the layer's
                part.training = False
            return layer(x, **rest)

        if not proof.holds(str(n), theirs, x, own, twin):
            assert proof.difference is not None
            stack.differs = tell(proof.difference)
            stack.report.left[stack.name] = stack.differs
            return stack.differs
        with as_in_evaluation(theirs):  # which draws no dropout
            x = own(x)
    stack.unproven = proof.compared < len(module.layers)
    return stack.refusal(module)  # with the layers' modes again


# The twin, and what it rests on


def twin_of(module: nn.TransformerEncoder) -> Encoder:
    twin = convert_encoder(module)
    twin.norm = None  # which is called by itself
    for ours, theirs in zip(twin.layers, module.layers, strict=True):
        attention: Any = ours.self_attn
        shared = {"_parameters": theirs.self_attn._parameters, "_modules": theirs.self_attn._modules}
        vars(attention).update(**shared, bias_k=None, bias_v=None)
    return twin


def _noted(module: nn.Module) -> tuple:
    """Modules by identity, with all that a layer's result rests on beside its parameters."""
    found: list[Any] = [len(hooks) for hooks in GLOBAL_HOOKS]
    for part in module.modules():
        own = None if part is module else vars(part).get("forward")
        hooked = [len(getattr(part, hooks)) for hooks in HOOKS] if part is not module else ()
        numbers = [vars(part).get(name) for name in NUMBERS]
        methods = [getattr(type(part), name, None) for name in METHODS] + [vars(part).get(name) for name in METHODS[1:]]
        found += (part, type(part), own, *methods, *hooked, *numbers, *map(type, part._parameters.values()))
    return tuple(found)


def refused(module: nn.TransformerEncoder) -> str | None:
    """Why an encoder cannot be computed from its weights, or None. What stands as its own `forward` is called, or ours."""
    if any(GLOBAL_HOOKS):
        return "there are hooks on every module, which would not run"
    if type(module) is not nn.TransformerEncoder:
        return f"it is a {type(module).__name__}"
    for part in module.modules():
        for name in METHODS:
            method = getattr(type(part), name, None)
            if method is not None and not method.__module__.startswith("torch.nn."):
                return f"{type(part).__name__}.{name} was replaced by {method.__module__}'s"
    for layer in module.layers:
        if type(layer) is not nn.TransformerEncoderLayer:
            return f"a {type(layer).__name__} may compute anything"
        why = why_not(layer)
        if why is None and layer.self_attn.bias_k is not None:
            why = "its attention has add_bias_kv"
        if why is not None:
            return why
    return None if len(module.layers) else "it has no layers"
