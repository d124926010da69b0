"""Train a small CLIP by contrast alone: images of digits and their captions, with dropout in both towers. A minute or two on a
CPU.

    python examples/train_clip.py                       # the curve in docs/train_clip.png
    python examples/train_clip.py --checkpoint clip.pt  # killed and begun again, it goes on bit for bit

The recipe is CLIP's (Radford et al., 2021): cross-entropy over rows and columns of the matrix of likenesses. A group is one image
of each digit with its caption, in one of three wordings: an image has one right caption and nine wrong ones, a caption one right
image. `train_digits_clip.py` made the weights that this repository ships. `pip install '.[bench]'` has everything it needs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import training
from torch import Tensor

from fastattn.models import digits
from fastattn.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

DOCS = Path(__file__).parent.parent / "docs"
DROPOUT = 0.1  # of attention
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
CLASSES = len(digits.NAMES)


class Batch(NamedTuple):
    images: Tensor  # (groups * CLASSES, 1, 8, 8), each group one of every digit in order
    input_ids: Tensor  # (CLASSES, MAX_TOKENS)
    attention_mask: Tensor


def model_of() -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=digits.VOCAB_SIZE, max_position_embeddings=digits.MAX_TOKENS, eos_token_id=digits.END,
        attention_dropout=DROPOUT, **TOWER,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=8, patch_size=2, num_channels=1, attention_dropout=DROPOUT, **TOWER)
    return CLIPModel(CLIPConfig(text, vision, projection_dim=64))


def draw_batch(images: digits.Images, groups: int) -> Batch:
    """Images at random, and the captions in one wording."""
    rows = [(images.labels == digit).nonzero()[:, 0] for digit in range(CLASSES)]
    taken = torch.stack([row[torch.randint(len(row), (groups,)).to(row.device)] for row in rows], 1).flatten()
    template = digits.TEMPLATES[int(torch.randint(len(digits.TEMPLATES), ()))]
    return Batch(images.pixel_values[taken], *(x.to(taken.device) for x in digits.captions(template)))


def loss_of(model: CLIPModel, batch: Batch) -> Tensor:
    """Of both directions; images of other groups, of which some show the same digit, are not compared."""
    logits = model(batch.input_ids, batch.images, batch.attention_mask).logits_per_image.unflatten(0, (-1, CLASSES))
    right = torch.arange(CLASSES, device=logits.device).repeat(len(logits))
    return sum(F.cross_entropy(x.flatten(0, 1), right) for x in (logits, logits.mT)) / 2


def main() -> None:
    parser = training.arguments(__doc__, steps=400, picture=DOCS / "train_clip.png")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--groups", type=int, default=8, help="of ten images in a step (default: %(default)s)")
    args = training.parse(parser)

    shown, held_out = (digits.Images(*(x.to(args.device) for x in images)) for images in digits.load_images())
    model = model_of().to(args.device).train()
    optimizer = torch.optim.AdamW(training.decayed(model, 0.1), args.learning_rate)
    schedule = training.warm_up(optimizer, args.steps)
    start = time.perf_counter()
    losses = training.run(model, optimizer, schedule, lambda: loss_of(model, draw_batch(shown, args.groups)), args)
    print(f"{time.perf_counter() - start:.0f} s; loss {training.smooth(losses, 20)[-1]:.4f} at the end of {len(losses)} steps")
    accuracy = [digits.zero_shot_accuracy(model.eval(), held_out, template) for template in digits.TEMPLATES]
    for template, share in zip(digits.TEMPLATES, accuracy, strict=True):
        print(f"zero-shot accuracy on {len(held_out.labels)} held-out images, captions {template!r}: {share:.3f}")
    title = f"digits and their captions by contrast; zero-shot accuracy {min(accuracy):.0%}"
    training.save_curve(losses, title, args.out, {"guessing among ten": 2.3026})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
