"""CUDA graphs of an accelerated encoder's calls: what is decided beforehand, what is read for it, and what is captured."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.graphs import Calls, Graphs, NotCaptured, bucket, on_gpu
from fastattn.integrations import accelerate_heads as heads
from fastattn.integrations.accelerate_decoding import decodes
from fastattn.integrations.accelerate_forward import Encoder, Replaced, laid_out
from fastattn.integrations.accelerate_padding import padding_of, padding_stays_unread, questions

MASK = "attention_mask"
HOMES = ("transformers.", "torch.nn.")


class Layout(NamedTuple):
    """How the tokens of a call lie in a graph: padding taken out, to so many rows, or left in, behind a mask or not."""

    masked: bool
    rows: int | None
    why_padded: str | None = None  # for the report


class EncoderGraphs:
    """Those of one encoder; those of all encoders of an `accelerate` share `graphs`."""

    def __init__(self, model: nn.Module, graphs: Graphs) -> None:
        self.calls = Calls(model, graphs, own_hooks=False, refuse=foreign)

    def drop(self) -> None:
        self.calls.graphs.drop()

    def unchanged(self) -> bool:
        return not torch.compiler.is_compiling() and self.calls.unchanged()

    def replayed(self, at: Replaced, inputs: dict[str, Any], unchanged: bool) -> Any | None:
        """The outputs of a call by a replay; or None, the reason in the report, and a mask where the other inputs are.

        unchanged: what `unchanged` has said in this call."""
        encoder = at.settings
        why = self._refusal(encoder, inputs, unchanged)
        if why is None:
            try:
                return self._replayed(at, inputs)
            except NotCaptured as error:
                why = str(error)
        encoder.report.not_captured[why] += 1
        if _on_host(inputs):
            inputs[MASK] = inputs[MASK].to(next(x.device for x in inputs.values() if isinstance(x, Tensor) and on_gpu(x)))
        return None

    def _refusal(self, encoder: Encoder, inputs: dict[str, Any], unchanged: bool) -> str | None:
        if torch.compiler.is_compiling():
            return "it is traced or compiled"
        family = encoder.family
        if family.reads_mask or family.masked_at == "encoder":
            return f"its model reads {family.mask} itself"
        if decodes(family, inputs):
            return "it is causal by is_decoder, or attends to encoder_hidden_states"
        if encoder.unproven:
            return "its layers are to be compared with their own code first"
        counted_on_host = _on_host(inputs)
        return self.calls.refusal([x for name, x in inputs.items() if not (counted_on_host and name == MASK)], unchanged)

    def _replayed(self, at: Replaced, inputs: dict[str, Any]) -> Any:
        encoder, layout = at.settings, _layout(at, inputs)
        ordered = sorted(inputs.items())
        names = [name for name, x in ordered if isinstance(x, Tensor)]
        values = {name: x for name, x in ordered if not isinstance(x, Tensor)}

        def run(static: list[Tensor]) -> tuple[Any, Tensor | None]:
            return laid_out(at, {**values, **dict(zip(names, static, strict=True))}, layout.masked, layout.rows)

        key = (layout.masked, layout.rows, *names, *((name, type(x), x) for name, x in values.items()))
        outputs, overflowed = self.calls(key, [inputs[name] for name in names], run)
        if layout.why_padded is not None:
            encoder.report.padded[layout.why_padded] += 1
        if layout.rows is not None:
            encoder.overflowed = None if encoder.capacity is None else overflowed  # rows that were counted suffice
        return outputs


def foreign(model: nn.Module) -> str | None:
    """A part of a model that may do anything, of which a replay would repeat the kernels alone, or None."""
    for name, module in model.named_modules():
        cls: Any = type(module)
        forward = vars(module).get("forward")
        if module is model:
            continue  # looked at in each call, as all layers are
        if forward is not None and not isinstance(forward, Replaced):
            return f"a forward was set on {name}"
        if not (cls.__module__.startswith(HOMES) and cls.forward.__module__.startswith(HOMES)):
            return f"{name} is a {cls.__name__}, which may do anything"
    return None


def _on_host(inputs: dict[str, Any]) -> bool:
    """Whether the mask is in the host's memory, beside inputs that are not."""
    mask = inputs.get(MASK)
    if type(mask) is not Tensor or on_gpu(mask):
        return False
    return any(isinstance(x, Tensor) and on_gpu(x) for x in inputs.values())


def _layout(at: Replaced, inputs: dict[str, Any]) -> Layout:
    """Reads the number of real tokens, and whether padding must stay in, at once; nothing of it where a capacity is given, or
    the mask is in the host's memory."""
    encoder, mask = at.settings, padding_of(at.settings, inputs)
    if mask is None or not encoder.family.unpads:
        return Layout(mask is not None, None)
    keep = mask.bool()
    why = padding_stays_unread(encoder, at.module, inputs, keep)
    if why is not None:
        return Layout(True, None, why)
    if encoder.capacity is not None:
        return Layout(False, encoder.capacity)
    total, why = _counted(encoder, at.module, inputs, keep)
    if total == keep.numel():
        return Layout(False, None)
    return Layout(True, None, why) if why is not None else Layout(False, min(bucket(total), keep.numel()))


def _counted(encoder: Encoder, model: nn.Module, inputs: dict[str, Any], keep: Tensor) -> tuple[int, str | None]:
    """The number of real tokens, and why padding must stay in, if it must, with one wait for the GPU."""
    if encoder.family.pooled in heads.ENDS or heads.labels_given():  # other tensors of the GPU are read with the mask
        asked = [*questions(encoder, model, inputs, keep)]
        total, *answers = _read([keep.sum(), *(holds for _, holds in asked)])
        return total, next((why for (why, _), holds in zip(asked, answers, strict=True) if holds), None)
    keep = keep.cpu()  # once, in place of a launch for each step
    total = int(keep.sum())
    if total == keep.numel():
        return total, None
    return total, next((why for why, holds in questions(encoder, model, inputs, keep) if bool(holds)), None)


def _read(numbers: list[Tensor]) -> list[int]:
    """Tensors without dimensions, on the host: those on the GPU in one transfer."""
    there = [x.long() for x in numbers if on_gpu(x)]
    read = iter(torch.stack(there).tolist() if there else ())
    return [next(read) if on_gpu(x) else int(x) for x in numbers]
