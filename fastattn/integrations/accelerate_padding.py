"""How the tokens of a call of an accelerated encoder lie: whether its padding is taken out, or why it stays in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn import masks
from fastattn.integrations import accelerate_heads as heads
from fastattn.integrations.accelerate_decoding import DECODES, decodes
from fastattn.integrations.accelerate_layers import Batch, traced
from fastattn.packing import Packing

if TYPE_CHECKING:
    from fastattn.integrations.accelerate_forward import Encoder


def padding_of(encoder: Encoder, inputs: dict[str, Any]) -> Tensor | None:
    """The padding mask among a model's arguments; None where there is none, or where only the model knows what it means."""
    family = encoder.family
    return None if family.mask is None or family.masked_at == "encoder" else inputs.get(family.mask)


def batch_of(encoder: Encoder, model: nn.Module, inputs: dict[str, Any], keep: Tensor | None) -> Batch:
    """How the tokens of a call lie, and what hides them from one another."""
    if decodes(encoder.family, inputs):
        if keep is not None:
            encoder.report.padded[DECODES] += 1
        return padded(encoder, keep, bool(inputs.get("is_decoder")))
    if keep is None or not encoder.family.unpads:
        return padded(encoder, keep)
    stays = _padding_stays(encoder, model, inputs, keep)
    if stays is not None:
        encoder.report.padded[stays] += 1
        return padded(encoder, keep)
    if encoder.capacity is None and traced(keep):
        return padded(encoder, keep)
    packing = Packing.from_mask(keep, encoder.capacity)
    encoder.overflowed = packing.overflowed
    if packing.known_total == keep.numel():
        return padded(encoder, None)
    return packed(encoder, packing)


def packed(encoder: Encoder, packing: Packing) -> Batch:
    return Batch(packing, masks.causal() if encoder.family.causal else None, {})


def padded(encoder: Encoder, keep: Tensor | None, is_decoder: bool = False) -> Batch:
    causal = masks.causal() if encoder.family.causal or is_decoder else None
    if keep is None:
        return Batch(None, causal, {})
    padding = masks.key_padding(keep)
    return Batch(None, padding if causal is None else padding & causal, {})


def masked(batch: Batch, keep: Tensor | None) -> Batch:
    """With the padding mask that a model has made for its encoder: (B, L), or (B, 1, L, L), which it adds to scores."""
    if keep is None:
        return batch
    keep = keep[:, 0, 0] == 0 if keep.dim() == 4 else keep.bool()
    if batch.proof is not None:
        batch.proof.keep = keep
    return batch._replace(mask=masks.key_padding(keep))


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
    pooler = getattr(model, "pooler", None) if encoder.family.encoder is None else None
    if pooler is not None and (pooler not in encoder.ours or vars(pooler).get("forward") is not encoder.ours[pooler]):
        return "its pooler is another one than it was"
    if encoder.unpad == "always":
        return None
    if encoder.reader is not None:
        return encoder.reader
    if torch.is_grad_enabled() and inputs.get("output_hidden_states", model.config.output_hidden_states):
        return "hidden states that may be asked for their gradients"  # copies of them are not on the way to a loss
    if encoder.capacity is not None or traced(keep):
        if encoder.family.measures:
            return "holes in a mask, over which distances count, are not looked for with a capacity"
        return heads.labels_for_each_token(keep)
    return None


def questions(encoder: Encoder, model: Any, inputs: dict[str, Any], keep: Tensor) -> Iterator[heads.Question]:
    """The rest, as what there is to read."""
    if encoder.capacity is not None or encoder.unpad == "always":
        return
    yield from heads.labels_at_padding(keep)
    if encoder.family.measures:
        yield heads.holes(keep)
    if encoder.pooled and encoder.family.pooled != "none":
        yield heads.pooled_padding(model, encoder.family.pooled, inputs, keep)


def unpacked(outputs: Any, packing: Packing, last: bool) -> Any:
    """With hidden states that were recorded between layers, (T, C), as (B, L, C), and the last one too."""

    def unpack(states: tuple) -> tuple:
        return tuple(packing.unpack(x) if isinstance(x, Tensor) and x.dim() == 2 else x for x in states)

    if isinstance(outputs, tuple):
        outputs = tuple(unpack(x) if isinstance(x, tuple) else x for x in outputs)
        return (*unpack(outputs[:1]), *outputs[1:]) if last else outputs
    if last and outputs["last_hidden_state"].dim() == 2:
        outputs["last_hidden_state"] = packing.unpack(outputs["last_hidden_state"])
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = unpack(outputs["hidden_states"])
    return outputs
