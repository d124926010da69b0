"""Pretrain a small BERT from nothing on the manual that comes with Python: masked letters, packed sequences and dropout. A few
minutes on a CPU.

    python examples/pretrain_bert.py                         # the curve in docs/pretrain_bert.png
    python examples/pretrain_bert.py --checkpoint bert.pt    # killed and begun again, it goes on bit for bit

The recipe is BERT's (Devlin et al., 2018): some tokens are to be told, of which most are hidden, dropout of 0.1, in attention
too, AdamW with weight decay, a learning rate that warms up. Three things differ, so that minutes show something: tokens are
letters, 30% are to be told and not 15% (Wettig et al., 2022), and a learned bias by distance, T5's, says who is a neighbour. A
step has lines of text end to end, as many as fit: no padding. Nothing is downloaded. `pip install '.[bench]'` has all it needs.
"""

from __future__ import annotations

import pydoc_data.topics
import re
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

from fastattn import Packing, biases, masks, varlen_attention
from fastattn.models.bert import BertConfig, BertForMaskedLM
from fastattn.models.implementations import IMPLEMENTATIONS

DOCS = Path(__file__).parent.parent / "docs"
PAD, BEGIN, MASK, SPECIAL = 0, 1, 2, 3
LONGEST, TOKENS = 128, 1024  # tokens of a sequence, and of a step at most
WIDTH, HEADS, BUCKETS = 128, 4, 32
CHOSEN = 0.3  # of the tokens
HELD_OUT = 20  # every twentieth line is not trained on
GAP = "?"  # a letter that is hidden, below
SHOWN = ("The v?lue of the expre?sion is a st?ing.", "If th? object is not fou?d, a Na?eError is rai?ed.", "def f(x): re?urn x")


def lines() -> list[str]:
    """The paragraphs of prose of the manual, cut where a sequence ends."""
    texts = dict.fromkeys(pydoc_data.topics.topics.values())  # some topics go by two names
    paragraphs = (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text))
    prose = [part for part in paragraphs if len(part.split()) >= 8 and "::=" not in part]
    return [line for part in prose for line in textwrap.wrap(part, LONGEST - 1)]


class Letters:
    """Text as tokens: one that begins it, then its letters."""

    def __init__(self, texts: list[str]) -> None:
        self.names = sorted(set("".join(texts)))
        self.ids = {name: n for n, name in enumerate(self.names, SPECIAL)}
        self.size = SPECIAL + len(self.names)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([BEGIN, *(self.ids[letter] for letter in text)])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.names[token - SPECIAL] for token in tokens.tolist())


class Batch(NamedTuple):
    input_ids: Tensor  # (T,), some hidden
    targets: Tensor  # (T,), the token where it is to be told, else -100
    packing: Packing


def hide(sequences: list[Tensor], size: int, device: str) -> Batch:
    """Sequences end to end, CHOSEN of their tokens to be told: of these 8 in 10 hidden, 1 another token, 1 as it is."""
    tokens = torch.cat(sequences)
    chosen = (torch.rand(tokens.shape) < CHOSEN) & (tokens >= SPECIAL)
    draw, other = torch.rand(tokens.shape), torch.randint(SPECIAL, size, tokens.shape)
    shown = torch.where(draw < 0.8, MASK, torch.where(draw < 0.9, other, tokens))
    packing = Packing.from_lengths(torch.tensor([len(x) for x in sequences], device=device), LONGEST)
    return Batch(torch.where(chosen, shown, tokens).to(device), torch.where(chosen, tokens, -100).to(device), packing)


def draw_batch(sequences: list[Tensor], size: int, device: str) -> Batch:
    """Sequences at random, until the next would be too much."""
    taken: list[Tensor] = []
    left = TOKENS
    while len(following := sequences[int(torch.randint(len(sequences), ()))]) <= left:
        taken.append(following)
        left -= len(following)
    return hide(taken, size, device)


class Model(BertForMaskedLM):
    """With a bias by distance, which all layers share."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, IMPLEMENTATIONS["fastattn"]._replace(attention=self.attend))
        farther = torch.arange(BUCKETS) % (BUCKETS // 2)  # of either side
        self.table = nn.Parameter(torch.randn(BUCKETS, HEADS) - farther[:, None])  # each head begins with some neighbours

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Packing, masks.Mask | None], dropout: float) -> Tensor:
        packing, visible = mask
        return varlen_attention(q, k, v, packing, visible, bias=biases.relative(self.table), dropout=dropout)


def loss_of(model: Model, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.input_ids, packing=batch.packing).logits, batch.targets)


@torch.no_grad()
def held_out_loss(model: Model, sequences: list[Tensor], size: int, device: str) -> float:
    """Of some batches, without dropout."""
    model.eval()
    losses = [loss_of(model, draw_batch(sequences, size, device)).item() for _ in range(8)]
    return sum(losses) / len(losses)


def loss_by_frequency(sequences: list[Tensor]) -> float:
    """That of telling letters by how frequent they are, without reading the text."""
    counts = torch.cat(sequences).bincount()[SPECIAL:].double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum().item()


@torch.no_grad()
def filled(model: Model, letters: Letters, text: str, device: str) -> str:
    """The text with the likeliest letter in the place of each gap."""
    tokens = letters.encode(text).to(device)
    hidden = tokens == letters.ids[GAP]
    packing = Packing.from_lengths([len(tokens)], LONGEST)
    logits = model.eval()(tokens.masked_fill(hidden, MASK), packing=packing).logits
    return letters.decode(torch.where(hidden, logits[:, SPECIAL:].argmax(-1) + SPECIAL, tokens)[1:])


def main() -> None:
    parser = training.arguments(__doc__, steps=500, picture=DOCS / "pretrain_bert.png")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    args = training.parse(parser)

    texts = lines()
    letters = Letters(texts)
    encoded = [letters.encode(text) for text in texts]
    sequences, held_out = [x for n, x in enumerate(encoded) if n % HELD_OUT], encoded[::HELD_OUT]
    config = BertConfig(
        letters.size, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        max_position_embeddings=LONGEST, initializer_range=0.05,
    )  # fmt: skip
    model = Model(config).to(args.device).train()
    optimizer = torch.optim.AdamW(training.decayed(model, 0.01), args.learning_rate, betas=(0.9, 0.98))
    schedule = training.warm_up(optimizer, args.steps)
    print(f"{len(sequences):,} lines of {sum(map(len, sequences)):,} letters, {len(letters.names)} different ones")

    start = time.perf_counter()
    losses = training.run(
        model, optimizer, schedule, lambda: loss_of(model, draw_batch(sequences, letters.size, args.device)), args
    )
    print(f"{time.perf_counter() - start:.0f} s; loss {training.smooth(losses, 20)[-1]:.3f} at the end of {len(losses)} steps")
    by_frequency, unseen = loss_by_frequency(sequences), held_out_loss(model, held_out, letters.size, args.device)
    print(f"{unseen:.3f} on lines that were held out; {by_frequency:.3f} by the frequency of letters alone")
    for text in SHOWN:
        print(f"  {text}  ->  {filled(model, letters, text, args.device)}")
    compared = {"by the frequency of letters alone": by_frequency, "on lines held out": unseen}
    training.save_curve(losses, "letters hidden in the Python manual, told by a BERT", args.out, compared)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
