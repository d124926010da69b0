"""PyTorch's dropout with the draws of fastattn's ops: so a model that runs its own code drops what it dropped on ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn import Packing, dropout
from fastattn.ops import attention_extras, ffn, norm

Draws = list[tuple[Tensor, int]]  # seeds in order, each with the tag of its op, 0 of attention


@contextmanager
def recorded(norms: int = dropout.LAYER_NORM) -> Iterator[Draws]:
    """Inside, what fastattn's ops draw, the norms among them all of one kind."""
    draws: Draws = []

    def record(tag):
        def seed_for(p, seed, device):
            drawn = dropout.seed_for(p, seed, device)
            if drawn is not None:
                draws.append((drawn, tag))
            return drawn

        return seed_for

    with pytest.MonkeyPatch.context() as patch:
        for module, tag in ((attention_extras, 0), (ffn, dropout.FFN_HIDDEN), (norm, norms)):
            patch.setattr(module, "seed_for", record(tag))
        yield draws


@contextmanager
def replayed(draws: Draws, torchs_own: tuple[int, ...] = (), packing: Packing | None = None) -> Iterator[None]:
    """Inside, F.dropout drops what these draws say, in order: those of attention of (B, H, M, N), others of (..., columns).

    Calls of the numbers `torchs_own` are PyTorch's, as they were when the draws were recorded. With a packing x is padded, and
    the others drew rows of the packed batch.
    """
    rest, number, torchs = iter(draws), iter(range(10**6)), F.dropout

    def replay(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        if next(number) in torchs_own:
            return torchs(x, p, training)
        seed, tag = next(rest)
        dropout.draw_seed(None, x.device)  # the generator moves on as it did
        assert (x.dim() == 4) == (tag == 0)
        if tag == 0:
            keep = fastattn.dropout_mask(seed, *x.shape, p)
        else:
            rows = x.shape[:-1].numel() if packing is None else packing.capacity
            keep = dropout.kept_elements(seed, rows, x.shape[-1], p, tag)
            keep = keep.view(x.shape) if packing is None else packing.unpack(keep)
        return torch.where(keep, x / (1 - p), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", replay)
        yield
    assert next(rest, None) is None, "some draws had no dropout"
