"""Where the tokens of a text are: in a padded batch (B, N), or in the T rows of a packed one.

Packed tensors have `packing.capacity` rows; those of no sequence, which only a static capacity has, are 0 in every output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.packing import Packing


def key_mask(attention_mask: Tensor | None, input_ids: Tensor, packing: Packing | None) -> Tensor | None:
    """Hugging Face's attention_mask (B, N), 1 = a real token, as bool; None for a packed input, which has no padding.

    Raises TypeError for a float mask, whose 0 may mean either thing, and ValueError for any other shape of mask or input_ids, and
    for a mask beside a packing.
    """
    if packing is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None with a packing, which says which tokens there are")
        if tuple(input_ids.shape) != (packing.capacity,):
            raise ValueError(f"input_ids must have shape ({packing.capacity},) as its packing, got {tuple(input_ids.shape)}")
        return None
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (B, N), or (T,) with a packing; got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must hold integers or bools, 1 = a real token; got {attention_mask.dtype}")
    if attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        raise ValueError(f"attention_mask must have the shape (B, N) of input_ids, {shapes}")
    return attention_mask.bool()


def positions(input_ids: Tensor, packing: Packing | None, limit: int) -> Tensor:
    """Position ids, (1, N) or (T,): the columns of the padded batch. Raises ValueError if it is longer than `limit`."""
    N = input_ids.shape[1] if packing is None else packing.max_length
    if limit < N:
        raise ValueError(f"input_ids has sequences of {N} tokens, but max_position_embeddings is {limit}")
    return torch.arange(N, device=input_ids.device)[None] if packing is None else packing.positions


def cleared(x: Tensor, packing: Packing | None) -> Tensor:
    """x (T, C) with 0 in the rows of no sequence, so that nothing of them is in a result or a gradient."""
    if packing is None or packing.full:
        return x
    return x.masked_fill(~packing.live[:, None], 0)


def take(x: Tensor, rows: Tensor, packing: Packing) -> Tensor:
    """(B, C): of x (T, C) the row rows[b] for each sequence, 0 for one without tokens. `rows` (B,) may hold anything there."""
    if packing.capacity == 0:
        return x.new_zeros(len(rows), *x.shape[1:])
    taken = x.index_select(0, rows.clamp(max=packing.capacity - 1))
    return taken.masked_fill((packing.lengths == 0)[:, None], 0)
