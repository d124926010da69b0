"""Which heads read hidden states at padding: there padding must stay in, or their loss and gradients would be other ones."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Classes of transformers and sentence-transformers (the ends of their names) that use every position, whatever the mask says.
READERS = {
    "BlipForQuestionAnswering": "its decoder attends to all positions",
    "ForQuestionAnswering": "its softmax is over all positions",
    "DPRReader": "it scores all positions",
    "DPRSpanPredictor": "it scores all positions",
    "CNN": "its convolutions reach over the end of a text",
    "MultiVectorMask": "it may score positions that the mask hides",
}
SUMMARIES = ("last", "mean", "cls_index")  # of ElectraForMultipleChoice, by its config: over all positions
LABELS = ("label", "target", "tags")  # parts of the names of arguments that may hold one for each token
MASKED_LOSSES = ("ElectraForPreTraining",)  # labels at padding are left out by the attention mask
ENDS = ("end", "eos")  # tokens that are found among the ids
IGNORED = -100  # the label that losses leave out
_thread = threading.local()  # .labels: what the heads around the current call were given


def reader_among(outside: nn.Module) -> str | None:
    """Why a module around an encoder reads padding in every call, itself or in what stands beside the encoder, or None."""
    return next((why for module in (outside, *outside.children()) if (why := _reads(module)) is not None), None)


def _reads(module: Any) -> str | None:
    for cls in type(module).__mro__:
        if not cls.__module__.startswith(("transformers.", "sentence_transformers.")):
            continue
        for end, why in READERS.items():
            if cls.__name__.endswith(end):
                return f"{cls.__name__}: {why}"
        if cls.__name__ == "ElectraForMultipleChoice" and module.config.summary_type in SUMMARIES:
            return f"{cls.__name__}: its summary is over all positions"
    return None


def takes_labels(module: nn.Module) -> bool:
    """Whether a head's `forward` has an argument for labels that may be at padding."""
    if any(cls.__name__ in MASKED_LOSSES for cls in type(module).__mro__):
        return False
    return any(_is_label(name) for name in inspect.signature(type(module).forward).parameters)


def _is_label(name: str) -> bool:
    return any(part in name for part in LABELS)


@contextlib.contextmanager
def labels_inside(inputs: dict[str, Any]) -> Iterator[None]:
    """Inside, on this thread, encoders see the labels among a head's arguments."""
    before = _labels()
    ignored = inputs.get("ignore_index", IGNORED)
    _thread.labels = (*before, *((x, ignored) for name, x in inputs.items() if _is_label(name) and isinstance(x, Tensor)))
    try:
        yield
    finally:
        _thread.labels = before


def labels_given() -> bool:
    return bool(_labels())


def _labels() -> tuple[tuple[Tensor, int], ...]:
    return getattr(_thread, "labels", ())


# Why padding must stay in a call. keep: bool (B, L), the real tokens. A `Question` is not read yet.

Question = tuple[str, Tensor]  # a reason, and bool (): whether it is one


def labels_for_each_token(keep: Tensor) -> str | None:
    """Without reading them."""
    if any(labels.shape == keep.shape for labels, _ in _labels()):
        return "labels for each token, which are not read with a capacity"
    return None


def labels_at_padding(keep: Tensor) -> Iterator[Question]:
    for labels, ignored in _labels():
        if labels.shape == keep.shape:
            labels, real = _together(labels, keep)
            yield "labels at padding", ((labels != ignored) & ~real).any()


def holes(keep: Tensor) -> Question:
    """Between real tokens: distances over them are others without."""
    runs = keep[:, :1].sum(1) + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
    return "a mask with holes, over which distances count", (runs > 1).any()


def pooled_padding(model: Any, pooled: str, inputs: dict[str, Any], keep: Tensor) -> Question:
    """Of CLIP's text model its end-of-text token is read, of SigLIP's the last one, of others the first, wherever padding is."""
    if pooled == "last":
        read = keep[:, -1]
    elif pooled in ENDS:
        ids, keep = _together(inputs["input_ids"].int(), keep)
        column = (ids if pooled == "end" and model.eos_token_id == 2 else (ids == model.eos_token_id).int()).argmax(
            1, keepdim=True
        )
        read = keep.gather(1, column)[:, 0]
    else:
        read = keep[:, 0]
    return "the token that is pooled is padding", (keep.any(1) & ~read).any()


def _together(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Both on one device, and where one is not on the host, not there: a copy to it would wait."""
    device = keep.device if x.device.type == "cpu" else x.device
    return x.to(device, non_blocking=True), keep.to(device, non_blocking=True)
