"""Teach a small model to describe images of digits and to answer questions about them: an encoder of overlapping patches, and
a decoder that looks at them by cross-attention. About two minutes on a CPU.

    python examples/caption.py                           # images with what it says of them, and the curve, in docs/caption.png
    python examples/caption.py --checkpoint caption.pt   # killed and begun again, it goes on bit for bit

Two or three of scikit-learn's digits stand in one row or two of a larger image. One decoder has both tasks: after [CAPTION] it
writes "a three above a seven left of a two", after [QUESTION] what is above the seven [ANSWER] it writes "three"; the loss is of
what it is to write alone. Every sixth digit is held out, and the images that the model is judged by are made of those.
`pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

from fastattn import masks
from fastattn.models import digits
from fastattn.nn import DecoderLayer, Encoder, EncoderLayer

DOCS = Path(__file__).parent.parent / "docs"
NAMES = digits.NAMES
SIDE, CELL, GLYPH = 20, 10, 8  # pixels: an image, what a digit may move in, a digit
PATCH, STRIDE, MARGIN = 9, 5, 2  # pixels of a patch, from patch to patch, and beyond the edge
PATCHES = ((SIDE + 2 * MARGIN - PATCH) // STRIDE + 1) ** 2
SHAPES = ((2,), (1, 1), (2, 1), (1, 2))  # digits in each row of an image, MOST in all
MOST = 3
TEXTS = 3  # of each image: its caption and two questions
PAD, END = 0, 1
WORDS = [
    "[PAD]", "[END]", "[CAPTION]", "[QUESTION]", "[ANSWER]", *NAMES, "a", "an", "above", "below", "left", "right", "of", "which",
    "what", "digit", "is", "the", "on", "at", "top", "bottom", "there", "where", "nowhere", "how", "many", "digits", "are", "yes",
    "no",
]  # fmt: skip
IDS = {word: n for n, word in enumerate(WORDS)}
LONGEST = 11  # tokens of the longest text: [CAPTION] an eight left of an eight above an eight [END]
JUDGED, SEEN = 1000, 10_000  # held-out images to be judged by; others from which answers are guessed without an image
SHOWN, MISTAKES = 8, 4  # images in the picture
RED = "#b5452c"

Rows = Sequence[Sequence[int]]  # an image as the digits in its rows, from top and left


class Text(NamedTuple):
    given: str  # ends in [CAPTION] or [ANSWER]
    answer: str


def named(digit: int) -> str:
    return f"{'an' if NAMES[digit] == 'eight' else 'a'} {NAMES[digit]}"


def caption(rows: Rows) -> Text:
    return Text("[CAPTION]", " above ".join(" left of ".join(map(named, row)) for row in rows))


def questions(rows: Rows) -> list[list[Text]]:
    """Every question that has one answer, in groups of which each is to be as likely as the others: thus "nowhere" is right as
    often as all places, and "no" as often as "yes"."""
    everything = [digit for row in rows for digit in row]
    if len(rows) == 1:
        places = {"on the left": rows[0][:1], "on the right": rows[0][1:]}
    else:
        places = {"on top": rows[0], "at the bottom": rows[1]}
    beside = [pair for row in rows for pair in zip(row[:-1], row[1:], strict=True)]  # the left one and the right one
    over = [(top, bottom) for top in rows[0] for bottom in rows[-1]] if len(rows) == 2 else []
    sides = {
        "left of": [(right, left) for left, right in beside],
        "right of": beside,
        "above": [(bottom, top) for top, bottom in over if len(rows[0]) == 1],
        "below": over if len(rows[-1]) == 1 else [],
    }
    absent = [digit for digit in range(len(NAMES)) if digit not in everything]
    found = [
        [(f"which digit is {place}", NAMES[there[0]]) for place, there in places.items() if len(there) == 1],
        [
            (f"what is {side} the {NAMES[of]}", NAMES[other])
            for side, pairs in sides.items() for of, other in pairs if everything.count(of) == 1
        ],
        [
            (f"where is the {NAMES[digit]}", place)
            for place, there in places.items() for digit in there if everything.count(digit) == 1
        ],
        [(f"where is the {NAMES[digit]}", "nowhere") for digit in absent],
        [(f"is there {named(digit)}", "yes") for digit in sorted(set(everything))],
        [(f"is there {named(digit)}", "no") for digit in absent],
        [("how many digits are there", NAMES[len(everything)])],
    ]  # fmt: skip
    return [[Text(f"[QUESTION] {words} [ANSWER]", answer) for words, answer in group] for group in found if group]


class Scenes(NamedTuple):
    images: Tensor  # (B, 1, SIDE, SIDE)
    texts: list[Text]  # of each image its caption and two questions: TEXTS B


def draw(glyphs: digits.Images, count: int) -> Scenes:
    """Images of every shape alike often, centred; each digit is somewhere in its cell."""
    pixels = glyphs.pixel_values
    images = pixels.new_full((count, 1, SIDE, SIDE), pixels.min().item())
    shapes = torch.randint(len(SHAPES), (count,)).tolist()
    chosen = torch.randint(len(pixels), (count, MOST))
    labels = glyphs.labels.cpu()[chosen].tolist()
    moved = torch.randint(CELL - GLYPH + 1, (count, MOST, 2)).tolist()
    chances = torch.rand(count, TEXTS - 1, 2).tolist()
    texts = []
    for n, image in enumerate(images):
        shape, rows, k = SHAPES[shapes[n]], [], 0
        for r, width in enumerate(shape):
            rows.append(labels[n][k : k + width])
            for c in range(width):
                y = (SIDE - len(shape) * CELL) // 2 + r * CELL + moved[n][k][0]
                x = (SIDE - width * CELL) // 2 + c * CELL + moved[n][k][1]
                image[:, y : y + GLYPH, x : x + GLYPH] = pixels[chosen[n, k]]
                k += 1
        groups = questions(rows)
        asked = [(groups[int(first * len(groups))], second) for first, second in chances[n]]
        texts += [caption(rows), *(group[int(second * len(group))] for group, second in asked)]
    return Scenes(images, texts)


def tokens_of(texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """(texts, LONGEST) padded on the right, and the lengths."""
    rows = [[IDS[word] for word in text.split()] for text in texts]
    padded = torch.tensor([row + [PAD] * (LONGEST - len(row)) for row in rows], device=device)
    return padded, torch.tensor([len(row) for row in rows], device=device)


class Captioner(nn.Module):
    def __init__(self, width: int = 96, heads: int = 4, layers: tuple[int, int] = (2, 3), dropout: float = 0.0) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.patches = nn.Conv2d(1, width, PATCH, STRIDE, MARGIN)
        self.places = nn.Parameter(torch.randn(PATCHES, width) * 0.02)
        self.encoder = Encoder(EncoderLayer(width, heads, 4 * width, **kind), layers[0], nn.LayerNorm(width))
        self.words, self.positions = nn.Embedding(len(WORDS), width), nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, 4 * width, **kind) for _ in range(layers[1]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(WORDS))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, SIDE, SIDE) -> (B, patches, width)."""
        return self.encoder(self.patches(images).flatten(2).mT + self.places)

    def decode(self, tokens: Tensor, lengths: Tensor, memory: Tensor) -> Tensor:
        """tokens (B, M), of which lengths (B,) are real, memory (B, patches, width): logits (B, M, words) of the next."""
        M = tokens.shape[1]
        x = self.words(tokens) + self.positions[:M]
        mask = masks.causal() & masks.padding(lengths)
        for layer in self.decoder:
            x = layer(x, memory, mask=mask)
        return self.head(self.norm(x))


def loss_of(model: Captioner, scenes: Scenes) -> Tensor:
    """Of the words to be written and [END]; each image is encoded once for all its texts."""
    device = scenes.images.device
    tokens, lengths = tokens_of([f"{text.given} {text.answer} [END]" for text in scenes.texts], device)
    _, given = tokens_of([text.given for text in scenes.texts], device)
    logits = model.decode(tokens[:, :-1], lengths - 1, model.encode(scenes.images).repeat_interleave(TEXTS, 0))
    written = torch.arange(1, LONGEST, device=device) >= given[:, None]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].where(written, PAD).flatten(), ignore_index=PAD)


@torch.no_grad()
def write(model: Captioner, scenes: Scenes) -> list[str]:
    """What the model says to each text's beginning: the likeliest word after all before it, until [END]."""
    model.eval()
    memory = model.encode(scenes.images).repeat_interleave(TEXTS, 0)
    tokens, lengths = tokens_of([text.given for text in scenes.texts], memory.device)
    given, going = lengths.tolist(), torch.arange(len(tokens), device=memory.device)
    while len(going):
        logits = model.decode(tokens[going], lengths[going], memory[going])
        following = logits[torch.arange(len(going), device=going.device), lengths[going] - 1].argmax(-1)
        tokens[going, lengths[going]] = following
        lengths[going] += 1
        going = going[(following != END) & (lengths[going] < LONGEST)]
    rows = [row[start:stop] for row, start, stop in zip(tokens.tolist(), given, lengths.tolist(), strict=True)]
    return [" ".join(WORDS[token] for token in row if token != END) for row in rows]


def guesses(texts: list[Text], seen: list[Text]) -> list[str]:
    """What is known without the image: to each beginning, the answer that most of the texts `seen` have, or "" to a new one."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for text in seen:
        answers[text.given][text.answer] += 1
    return [answers[text.given].most_common(1)[0][0] if text.given in answers else "" for text in texts]


def kind_of(text: Text) -> str:
    """Of a question its first two words."""
    return "captions" if text.given == "[CAPTION]" else " ".join(text.given.split()[1:3])


def report(texts: list[Text], said: list[str], blind: list[str]) -> dict[str, float]:
    """Print the share of texts exactly right, of captions, of questions and of each kind of them; the shares of `said`."""
    members: dict[str, list[int]] = {"captions": [], "questions": []}
    for n, text in enumerate(texts):
        members.setdefault(kind_of(text), []).append(n)
    members["questions"] = sorted(n for name, found in members.items() if name != "captions" for n in found)
    shares = {}
    print(f"{'exactly right, held out':<26}{'of':>6}{'model':>9}{'no image':>10}")
    for name, found in members.items():
        shares[name], guessed = (sum(x[n] == texts[n].answer for n in found) / max(1, len(found)) for x in (said, blind))
        label = name if name in ("captions", "questions") else f"  {name} ..."
        print(f"{label:<26}{len(found):>6}{shares[name]:>9.1%}{guessed:>10.1%}")
    return shares


def lines_of(scenes: Scenes, said: list[str], n: int) -> list[tuple[str, bool]]:
    """What is printed and drawn of image n, and whether it is right: below what is wrong stands what is right."""
    found = []
    for text, words in zip(scenes.texts[n * TEXTS :][:TEXTS], said[n * TEXTS :][:TEXTS], strict=True):
        asked = " ".join(text.given.split()[1:-1])
        found.append((f"{asked}? {words}" if asked else words, words == text.answer))
        found += [] if words == text.answer else [(f"✗ right: {text.answer}", False)]
    return found


def draw_picture(scenes: Scenes, said: list[str], losses: list[float], shares: dict[str, float], path: Path) -> None:
    """The first images with what is said of them, then the first others with a mistake, beside the curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [lines_of(scenes, said, n) for n in range(len(scenes.images))]
    wrong = [n for n, found in enumerate(lines) if n >= SHOWN and not all(right for _, right in found)]
    figure = pyplot.figure(figsize=(12.4, 7.2))
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    axes = left.subplots(3, 4, gridspec_kw={"left": 0.02, "right": 0.98, "bottom": 0.145, "top": 0.94, "hspace": 0.7})
    for axis in axes.flat:
        axis.axis("off")
    for axis, n in zip(axes.flat, [*range(min(SHOWN, len(lines))), *wrong[:MISTAKES]], strict=False):
        axis.axis("on")
        axis.imshow(-scenes.images[n, 0].cpu(), cmap="gray", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(training.PALE)
        for row, (words, is_right) in enumerate(lines[n]):
            place = {"transform": axis.transAxes, "ha": "center", "va": "top"}
            axis.text(0.5, -0.05 - 0.11 * row, words, fontsize=7.5, color="black" if is_right else RED, **place)
    left.suptitle(f"held-out images: the first {SHOWN}, then the first others with a mistake", fontsize=10)
    title = f"{shares['captions']:.0%} of captions and {shares['questions']:.0%}\nof answers are right"
    curve = right.subplots(gridspec_kw={"left": 0.2, "right": 0.97, "bottom": 0.12, "top": 0.91})
    training.draw_curve(curve, losses, title)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = training.arguments(__doc__, steps=1600, picture=DOCS / "caption.png")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step, each with three texts (default: %(default)s)")
    args = training.parse(parser)

    shown, held_out = (digits.Images(*(x.to(args.device) for x in images)) for images in digits.load_images())
    model = Captioner().to(args.device).train()
    optimizer = torch.optim.AdamW(training.decayed(model, 0.05), args.learning_rate)
    schedule = training.warm_up(optimizer, args.steps)
    start = time.perf_counter()
    losses = training.run(model, optimizer, schedule, lambda: loss_of(model, draw(shown, args.batch)), args)
    print(f"{time.perf_counter() - start:.0f} s; loss {training.smooth(losses, 20)[-1]:.4f} at the end of {len(losses)} steps")

    scenes = draw(held_out, JUDGED)
    said = write(model, scenes)
    shares = report(scenes.texts, said, guesses(scenes.texts, draw(shown, SEEN).texts))
    for n in range(SHOWN):
        print("  " + "; ".join(words for words, _ in lines_of(scenes, said, n)))
    draw_picture(scenes, said, losses, shares, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
