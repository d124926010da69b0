"""Teach a small T5 to write numerals in English words: encoder, decoder, learned biases by distance, dropout. A few minutes
on a CPU.

    python examples/train_t5.py                      # the curve in docs/train_t5.png
    python examples/train_t5.py --checkpoint t5.pt   # killed and begun again, it goes on bit for bit

"3047" is to become "three thousand forty seven". There are no position embeddings: where a digit stands is known by T5's table of
biases alone (Raffel et al., 2020), which gets its gradient from the attention kernel. Every thirteenth number from 100 on is
held out. `pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import fastattn
from fastattn import biases, masks

DOCS = Path(__file__).parent.parent / "docs"
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
PAD, BEGIN, END = 0, 1, 2
NAMES = ["[PAD]", "[BEGIN]", "[END]", *"0123456789", *UNITS, *TENS[2:], "hundred", "thousand"]
IDS = {name: n for n, name in enumerate(NAMES)}
DIGITS, MOST = 4, 7  # digits of a numeral, and words of its name with one more token
HELD_OUT = 13
BUCKETS = 32
SHOWN = (0, 7, 40, 312, 1_984, 9_001, 9_999)


def words(n: int) -> list[str]:
    """The English name of 0 to 999,999."""
    if n >= 1000:
        return [*words(n // 1000), "thousand", *(words(n % 1000) if n % 1000 else [])]
    if n >= 100:
        return [UNITS[n // 100], "hundred", *(words(n % 100) if n % 100 else [])]
    return [UNITS[n]] if n < 20 else [TENS[n // 10], *([UNITS[n % 10]] if n % 10 else [])]


class Batch(NamedTuple):
    digits: Tensor  # (B, DIGITS + 1) with [END], without which 99 and 9 would look the same, padded on the right
    lengths: Tensor  # (B,) tokens of each
    given: Tensor  # (B, MOST): what the decoder reads, [BEGIN] and the words
    targets: Tensor  # (B, MOST): what it is to say, the words and [END]; PAD where nothing


def batch_of(numbers: list[int], device: str) -> Batch:
    def padded(rows: list[list[str]], length: int) -> Tensor:
        return torch.tensor([[IDS[name] for name in row] + [PAD] * (length - len(row)) for row in rows], device=device)

    numerals, names = [[*str(n), "[END]"] for n in numbers], [words(n) for n in numbers]
    lengths = torch.tensor([len(row) for row in numerals], device=device)
    given, targets = ([["[BEGIN]", *row] for row in names], [[*row, "[END]"] for row in names])
    return Batch(padded(numerals, DIGITS + 1), lengths, padded(given, MOST), padded(targets, MOST))


def is_held_out(n: int) -> bool:
    return n >= 100 and n % HELD_OUT == 0


def draw(count: int, held_out: bool) -> list[int]:
    """Numbers of one digit to DIGITS, as many of each length as of any other; in order, so that those of one length are computed
    together."""
    found: list[int] = []
    while len(found) < count:
        n = int(torch.randint(10 ** int(torch.randint(1, DIGITS + 1, ())), ()))
        if is_held_out(n) == held_out:
            found.append(n)
    return sorted(found)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, memory: Tensor, mask: masks.Mask, bias: biases.Bias | None) -> Tensor:
        """x (B, M, C), memory (B, N, C) -> (B, M, C)."""
        q, k, v = (
            linear(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, given in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        out = fastattn.attention(q, k, v, mask, bias=bias, dropout=self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention to its own tokens, of a decoder to the encoder's as well, and a feed-forward block, each normed before it."""

    def __init__(self, width: int, heads: int, dropout: float, decoder: bool) -> None:
        super().__init__()
        self.itself = Attention(width, heads, dropout)
        self.other = Attention(width, heads, dropout) if decoder else None
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(3 if decoder else 2))
        self.dropout = dropout

    def forward(
        self, x: Tensor, mask: masks.Mask, bias: biases.Bias, memory: Tensor | None = None, seen: masks.Mask | None = None
    ) -> Tensor:
        p, norms = self.dropout if self.training else 0.0, list(self.norms)
        normed = fastattn.add_rms_norm(x, None, norms[0])
        y = self.itself(normed, normed, mask, bias)
        if self.other is not None:  # x and dropout(y) are summed in the norm that comes next
            normed, x = fastattn.add_rms_norm(y, x, norms[1], dropout=p, return_sum=True)
            y = self.other(normed, memory, seen, None)
        normed, x = fastattn.add_rms_norm(y, x, norms[-1], dropout=p, return_sum=True)
        y = fastattn.ffn(normed, self.up.weight, None, self.down.weight, None, activation="relu", dropout=p)
        return x + F.dropout(y, p)


class T5(nn.Module):
    def __init__(self, vocabulary: int, width: int = 128, heads: int = 4, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(Layer(width, heads, dropout, decoder=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, dropout, decoder=True) for _ in range(layers))
        self.tables = nn.ParameterList(torch.randn(BUCKETS, heads) for _ in range(2))  # of all layers of the encoder, the decoder
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x, mask, bias = self.embedding(tokens), masks.padding(lengths, lengths), biases.relative(self.tables[0])
        for layer in self.encoder:
            x = layer(x, mask, bias)
        return fastattn.add_rms_norm(x, None, self.norms[0])

    def decode(self, tokens: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, M, vocabulary) of the token after each."""
        x, mask, seen = self.embedding(tokens), masks.causal(), masks.padding(lengths)
        bias = biases.relative(self.tables[1], bidirectional=False)
        for layer in self.decoder:
            x = layer(x, mask, bias, memory, seen)
        return self.head(fastattn.add_rms_norm(x, None, self.norms[1]))

    def forward(self, batch: Batch) -> Tensor:
        return self.decode(batch.given, self.encode(batch.digits, batch.lengths), batch.lengths)


def loss_of(model: T5, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.targets.flatten(), ignore_index=PAD)


@torch.no_grad()
def write(model: T5, batch: Batch) -> Tensor:
    """The likeliest word after each, from [BEGIN] on: (B, MOST)."""
    model.eval()
    memory = model.encode(batch.digits, batch.lengths)
    tokens = torch.full_like(batch.given[:, :1], BEGIN)
    for _ in range(MOST):
        following = model.decode(tokens, memory, batch.lengths)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
    return tokens[:, 1:]


def spoken(row: list[int]) -> str:
    return " ".join(NAMES[token] for token in row[: row.index(END) if END in row else MOST])


def main() -> None:
    parser = training.arguments(__doc__, steps=500, picture=DOCS / "train_t5.png")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="numbers in a step (default: %(default)s)")
    args = training.parse(parser)

    model = T5(len(NAMES)).to(args.device).train()
    optimizer = torch.optim.AdamW(training.decayed(model, 0.01), args.learning_rate)
    schedule = training.warm_up(optimizer, args.steps)
    start = time.perf_counter()
    losses = training.run(
        model, optimizer, schedule, lambda: loss_of(model, batch_of(draw(args.batch, held_out=False), args.device)), args
    )
    print(f"{time.perf_counter() - start:.0f} s; loss {training.smooth(losses, 20)[-1]:.4f} at the end of {len(losses)} steps")

    numbers = draw(400, held_out=True)
    said = [spoken(row) for row in write(model, batch_of(numbers, args.device)).tolist()]
    right = sum(text == " ".join(words(n)) for n, text in zip(numbers, said, strict=True))
    print(f"{right} of {len(numbers)} held-out numbers are written without a mistake")
    for n, row in zip(SHOWN, write(model, batch_of(list(SHOWN), args.device)).tolist(), strict=True):
        print(f"  {n:>5}  {spoken(row)}")
    training.save_curve(losses, f"numerals into words: {right / len(numbers):.0%} of held-out numbers right", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
