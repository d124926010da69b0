"""The recipes of `python -m benchmarks.ops --suite training`: masks, dropout and biases as in the training of encoders.

fastattn draws its dropout from a seed and is held to fp64 with the very weights dropped. The others draw their own: they are held
to fp64 without dropout, and with it to the mean and the variance of a row's sum of weights (`check_rate`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.attention_providers import BUCKETS, TABLE, TENSOR, Request, Run
from benchmarks.mask_cases import FULL, TINY, cases
from fastattn import reference
from fastattn.testing import UNIT, AttentionInputs

DROPOUT, SEED = 0.1, 2**40 + 3
SIGMAS = 6
# PyTorch's memory-efficient kernel, by its source, then takes a host's address for a device's: an illegal access in the replay.
SEED_ON_HOST = "a forward pass outside of the capture may keep its dropout's seed on the host, where no graph can read it"
GATE = "without dropout the accuracy rule; with it, the mean and the variance of the sums of kept weights"


@dataclass(frozen=True)
class Recipe:
    """Attention of one layer in training. batch and cpu_batch: sequences on a GPU and on a CPU. `padded` ones are given their
    lengths though no token be padding, as a pipeline gives the mask of every batch."""

    name: str
    H: int = 12
    S: int = 512
    D: int = 64
    batch: int = 32
    cpu_batch: int = 2
    causal: bool = False
    fill: float = 1.0
    bias: str | None = None
    dropout: float = DROPOUT
    padded: bool = True
    rows: bool = False  # text and then an image, under `masks.rows`

    def small(self) -> Recipe:
        """For a smoke run."""
        return dataclasses.replace(self, H=2, S=TINY.S if self.rows else 48, batch=2, cpu_batch=2)

    def request(self, B: int, device: torch.device) -> Request:
        structure = None
        if self.rows:
            structure = cases(FULL if self.S == FULL.S else TINY, B, device)[0]
        lengths = shapes.ragged_lengths(B, self.S, self.fill).to(device) if self.padded else None
        return Request(B, self.H, self.S, self.D, self.causal, lengths, device, self.bias, self.dropout, SEED, structure)

    def learned(self) -> tuple[int, ...] | None:
        """The shape of what is learned of the bias."""
        return {None: None, TENSOR: (1, self.H, self.S, self.S), TABLE: (BUCKETS, self.H)}[self.bias]


RECIPES = (
    Recipe("bert-base-512, dropout", padded=False),
    Recipe("bert-base-512, padding mask, dropout"),
    Recipe("bert-base-512, dropout", fill=0.5),
    Recipe("bert-base-128, dropout", S=128, cpu_batch=8),
    Recipe("bert-base-128, dropout", S=128, cpu_batch=8, fill=0.5),
    Recipe("t5-base-512, learned table, dropout", fill=0.5, bias=TABLE),
    Recipe("t5-base-512, learned bias, dropout", fill=0.5, bias=TENSOR),
    Recipe("clip-text-77", H=8, S=77, cpu_batch=8, causal=True, dropout=0.0, padded=False),
    Recipe("axial, rows of 32 × 32, dropout", S=FULL.S, rows=True, padded=False),
)


def visible_pairs(request: Request) -> tuple[float, int]:
    """(pairs of a real query and a key that it sees, real tokens), over all sequences."""
    if request.structure is not None:
        pairs = request.structure.mask.pairs(request.S, request.S, request.device)
        return float(pairs.expand(request.B, 1, request.S, request.S).sum()), request.B * request.S
    n = torch.full((request.B,), request.S) if request.lengths is None else request.lengths.cpu()
    n = n.double()
    return float((n * (n + 1) / 2).sum() if request.causal else (n * n).sum()), int(n.sum())


def check_rate(run: Run, x: AttentionInputs, real: Tensor) -> None:
    """Raise AssertionError unless a random dropout keeps weights at the rate asked for, and rescales them.

    With v = 1 a row of the result is the sum of its kept weights, P K / (1 - p): its mean is 1, its variance p / (1 - p) times
    the sum of P^2, and how far the squares of that spread follows from the sum of P^4. real: (B, 1, S, 1), queries that are no
    padding.
    """
    biased = dataclasses.replace(x, dropout=0.0).extras(double=True)
    learned = () if x.learned is None else (x.learned,)
    with torch.no_grad():
        sums = run(x.q, x.k, torch.ones_like(x.v), *learned)[..., 0].double()
        s, _ = reference.scores(x.q.double(), x.k.double(), x.lowered(), x.scale, biased)
        squares = torch.softmax(s, -1).square()
    rows, odds = real[..., 0].expand_as(sums), x.dropout / (1 - x.dropout)
    off, variance, fourths = (sums - 1)[rows], squares.sum(-1)[rows] * odds, squares.square().sum(-1)[rows]
    n = off.numel()
    mean, bound = abs(float(off.mean())), SIGMAS * float(variance.sum().sqrt()) / n + UNIT[x.q.dtype]
    assert mean <= bound, f"dropout: rows sum to 1 + {mean:.2e} on average, over {bound:.2e}"
    fourth = x.dropout + (1 - x.dropout) * odds**4  # moment of K / (1 - p) - 1
    spread = 2 * variance.square() + fourths * (fourth - 3 * odds**2)  # of off^2, a row's fourth moment less its variance^2
    ratio = float(off.square().sum() / variance.sum())
    most = SIGMAS * float(spread.sum().sqrt() / variance.sum()) + UNIT[x.q.dtype]
    assert abs(ratio - 1) <= most, f"dropout: the variance of rows' sums is {ratio:.2f} of that at the rate asked for"
