"""Calls of an encoder as a decoder: tokens see only what is before them, or attend to states of another model, or both.

Padding stays in: its rows are then what the model gives there, which a loss over shifted labels reads.
B, L, C: sequences, padded length, hidden size; S, M: length and width of the other model's states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastattn.integrations.accelerate_layers import traced
from fastattn.integrations.accelerate_parts import Family

if TYPE_CHECKING:
    from fastattn.integrations.accelerate_forward import Encoder

STATES, STATES_MASK = "encoder_hidden_states", "encoder_attention_mask"
DECODES = "is_decoder or encoder_hidden_states was given"
HOST = "cpu"
UNREAD = "is not read in a trace, or on a GPU with a capacity"


class Kind(NamedTuple):
    """What a call asks of the layers; each kind is compared with the layers' own code by itself."""

    causal: bool = False
    crossed: bool = False  # there are states of another model,
    hidden: bool = False  # and a mask that hides some of them


def decodes(family: Family, inputs: dict[str, Any]) -> bool:
    return family.decodes and (bool(inputs.get("is_decoder")) or inputs.get(STATES) is not None)


def kind_of(family: Family, inputs: dict[str, Any]) -> Kind:
    """Of a call that is served. Reads a mask of states."""
    if not decodes(family, inputs):
        return Kind()
    keep = inputs.get(STATES_MASK)
    return Kind(bool(inputs.get("is_decoder")), inputs.get(STATES) is not None, keep is not None and not bool(keep.all()))


def not_decoded(encoder: Encoder, model: Any, inputs: dict[str, Any], tokens: Tensor | None, mask: Tensor | None) -> str | None:
    """Why a call as a decoder is not served, or None. tokens: ids (B, L), or embeddings (B, L, C); mask: (B, L), of padding."""
    causal, states, keep = bool(inputs.get("is_decoder")), inputs.get(STATES), inputs.get(STATES_MASK)
    if causal and inputs.get("use_cache") is None and model.config.use_cache:
        return "use_cache=True, which its config says"
    if states is not None:
        if any(parts.cross_query is None for parts in encoder.found.parts.values()):
            return f"{STATES} was given to layers without cross attention"
        if not isinstance(states, Tensor) or states.dim() != 3 or tokens is None or len(states) != len(tokens):
            return f"{STATES} is not of shape (batch, length, width)"
    if keep is not None:
        if states is None:
            return f"{STATES_MASK} was given without {STATES}"
        if not isinstance(keep, Tensor) or keep.shape != states.shape[:2]:
            return f"{STATES_MASK} is not of the shape (batch, length) of {STATES}"
        if _unread(encoder, keep):
            return f"{STATES_MASK} {UNREAD}"
    if mask is None or not decodes(encoder.family, inputs):
        return None
    if _unread(encoder, mask):
        return f"{encoder.family.mask} {UNREAD}, beside is_decoder or {STATES}"
    seen = mask[:, :1] if causal else mask  # by the first token
    # one that sees nothing is given the mean of all values by the model, and 0 by us
    return None if bool(seen.bool().any(1).all()) else f"{encoder.family.mask} hides all from a token"


def _unread(encoder: Encoder, mask: Tensor) -> bool:
    return traced(mask) or (encoder.capacity is not None and mask.device.type != HOST)
