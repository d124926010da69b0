"""Draw digits pixel by pixel: a decoder in the manner of DALL-E, whose layers see of what was drawn the row, the column or the
neighbourhood. A few minutes on a CPU.

    python examples/image_tokens.py                         # samples and the curve in docs/image_tokens.png
    python examples/image_tokens.py --checkpoint image.pt   # killed and begun again, it goes on bit for bit

scikit-learn's digits are 8 x 8 tokens of 17 shades, behind one token that names the digit: a text and then an image, under the
masks `rows`, `columns` and `conv` (Ramesh et al., 2021, arXiv:2102.12092). The small CLIP in this repository judges the samples.
`pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import fastattn
from fastattn import masks
from fastattn.models import digits
from fastattn.models.clip import CLIPModel

DOCS = Path(__file__).parent.parent / "docs"
SIDE, SHADES, CLASSES = 8, 17, 10
PIXELS = SIDE * SIDE
MASKS = (masks.rows(SIDE, SIDE, 1), masks.columns(SIDE, SIDE, 1), masks.conv(SIDE, SIDE, 5, 1))  # one for each layer
SAMPLES = 12  # drawn of each digit


def load() -> tuple[Tensor, Tensor]:
    """Training and held-out sequences, (images, 1 + PIXELS): the digit, as a token after the shades, and its pixels in order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = torch.tensor(found.images).long().flatten(1), torch.tensor(found.target).long()
    tokens = torch.cat([SHADES + labels[:, None], pixels], 1)
    held_out = torch.arange(len(tokens)) % digits.HELD_OUT == 0
    return tokens[~held_out], tokens[held_out]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, mask: masks.Mask) -> Tensor:
        """x (B, N, C): normed attention and normed feed-forward, each added to it."""
        p, (first, second) = self.dropout if self.training else 0.0, self.norms
        normed = fastattn.add_layer_norm(x, None, first.weight, first.bias, eps=first.eps)
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        y = self.out(fastattn.attention(q, k, v, mask, dropout=p).transpose(1, 2).flatten(2))
        normed, x = fastattn.add_layer_norm(y, x, second.weight, second.bias, eps=second.eps, dropout=p, return_sum=True)
        y = fastattn.ffn(normed, self.up.weight, self.up.bias, self.down.weight, self.down.bias, dropout=p)
        return x + F.dropout(y, p)


class Decoder(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(SHADES + CLASSES, width)
        self.position = nn.Parameter(torch.randn(PIXELS, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in MASKS)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SHADES)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), N <= PIXELS: logits (B, N, SHADES) of the pixel after each."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for layer, mask in zip(self.layers, MASKS, strict=True):
            x = layer(x, mask)
        return self.head(fastattn.add_layer_norm(x, None, self.norm.weight, self.norm.bias, eps=self.norm.eps))


def loss_of(model: Decoder, tokens: Tensor) -> Tensor:
    """Nats for a pixel."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def sample(model: Decoder, labels: Tensor) -> Tensor:
    """Pixels (B, PIXELS), each drawn from what the model makes of those before it."""
    model.eval()
    tokens = SHADES + labels[:, None]
    for _ in range(PIXELS):
        share = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(share, 1)], 1)
    return tokens[:, 1:]


def recognised(pixels: Tensor, labels: Tensor) -> float:
    """The share of images in which the small CLIP, trained on the same digits, sees theirs."""
    shown, _ = load()
    known = shown[:, 1:].float()
    values = ((pixels.cpu().float() - known.mean()) / known.std()).view(-1, 1, SIDE, SIDE)
    return digits.zero_shot_accuracy(CLIPModel.from_pretrained(digits.DIRECTORY), digits.Images(values, labels.cpu()))


def draw(pixels: Tensor, losses: list[float], title: str, path: Path, lines: dict[str, float]) -> None:
    """The samples, a row for each digit, beside the curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 4), layout="constrained", width_ratios=(1.15, 1))
    edge = F.pad(pixels.view(CLASSES, SAMPLES, SIDE, SIDE).cpu(), (0, 1, 0, 1))  # a line between images
    left.imshow(-edge.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy(), cmap="gray", interpolation="nearest")
    left.set_title(title, fontsize=10)
    left.axis("off")
    training.draw_curve(right, losses, "nats for a pixel", lines)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = training.arguments(__doc__, steps=400, picture=DOCS / "image_tokens.png")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (default: %(default)s)")
    args = training.parse(parser)

    tokens, held_out = (x.to(args.device) for x in load())
    model = Decoder().to(args.device).train()
    optimizer = torch.optim.AdamW(training.decayed(model, 0.05), args.learning_rate)
    start = time.perf_counter()
    losses = training.run(
        model,
        optimizer,
        training.warm_up(optimizer, args.steps),
        lambda: loss_of(model, tokens[torch.randint(len(tokens), (args.batch,)).to(args.device)]),
        args,
    )
    print(f"{time.perf_counter() - start:.0f} s; loss {training.smooth(losses, 20)[-1]:.3f} at the end of {len(losses)} steps")

    with torch.no_grad():
        unseen = loss_of(model.eval(), held_out).item()
    print(f"{unseen:.3f} nats for a pixel of {len(held_out)} held-out images; {math.log(SHADES):.3f} for shades at random")
    labels = torch.arange(CLASSES, device=args.device).repeat_interleave(SAMPLES)
    pixels = sample(model, labels)
    share = recognised(pixels, labels)
    print(f"the small CLIP sees the right digit in {share:.0%} of {len(labels)} samples")
    title = f"drawn pixel by pixel; CLIP sees the digit in {share:.0%}"
    draw(pixels, losses, title, args.out, {"on images held out": unseen})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
